//! The `iii` program.
fn main() {}
