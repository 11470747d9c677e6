//! `iii worker`, under the name that the engine calls.

fn main() -> std::process::ExitCode {
    iii::cli::iii_worker()
}
