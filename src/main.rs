//! The `iii` program.

fn main() -> std::process::ExitCode {
    iii::cli::iii()
}
