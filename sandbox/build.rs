//! Builds the init of microVMs, a static Linux program, for the tool to embed.
//!
//! Cargo cannot build a dependency for another target or with other flags, so this runs it once
//! more, on the same lock file. On Linux with what is downloaded already: the init's dependencies
//! are the tool's. Elsewhere some are Linux's alone.

#![allow(
    clippy::disallowed_methods,
    reason = "Cargo tells a build script all by variables"
)]

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    // The workspace's manifest has the profile of that program and the versions that it asks for.
    println!("cargo::rerun-if-changed=../Cargo.toml");
    println!("cargo::rerun-if-changed=../init/Cargo.toml");
    println!("cargo::rerun-if-changed=../init/src");
    println!("cargo::rerun-if-changed=../Cargo.lock");
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if env::var_os("CARGO_FEATURE_LIBKRUN").is_none() || !["linux", "macos"].contains(&os.as_str())
    {
        return;
    }
    let program = build(&os);
    println!("cargo::rustc-env=III_INIT={}", program.display());
}

fn build(os: &str) -> PathBuf {
    let arch = variable("CARGO_CFG_TARGET_ARCH");
    let (target, mut flags) = match env::var("CARGO_CFG_TARGET_ENV").as_deref() {
        // The C library to link statically comes with every C compiler.
        Ok("gnu") if os == "linux" => (
            format!("{arch}-unknown-linux-gnu"),
            vec!["-Ctarget-feature=+crt-static"],
        ),
        _ => (
            format!("{arch}-unknown-linux-musl"),
            vec!["-Ctarget-feature=+crt-static"],
        ),
    };
    if os != "linux" {
        // That target brings its C library along, and rustc its linker.
        flags.extend(["-Clinker=rust-lld", "-Clinker-flavor=ld.lld"]);
    }
    let source = variable("CARGO_MANIFEST_DIR");
    let directory = Path::new(&variable("OUT_DIR")).join("init");
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .args(["build", "--quiet", "--locked"])
        .args((os == "linux").then_some("--offline"))
        .args(["--package", "iii-init", "--bin", "iii-init"])
        .args(["--profile", "init", "--target", &target])
        .arg("--target-dir")
        .arg(&directory)
        .current_dir(&source)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        // They are for the tool: a linter in the compiler's place, another target or linker.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET");
    let status = cargo.status();
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "building the init of microVMs for {target} failed ({status:?}); `rustup target add {target}` may be missing, or build \
         with --no-default-features for a tool without microVMs"
    );
    directory.join(target).join("init/iii-init")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}
