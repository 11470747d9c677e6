//! The init of a microVM, as a static program.

// Rust's own start wants three open descriptors, and where a kernel finds no console there are
// none.
#![cfg_attr(target_os = "linux", no_main)]

/// Called by the C runtime.
#[cfg(target_os = "linux")]
// SAFETY: no other function of this program has that name.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> std::ffi::c_int {
    iii_init::machine::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {}
