//! The commands and the base image of a project that does not name its own.
//!
//! A setup command asks first whether the tool is there, so that on a base image that has it the
//! step does nothing and its layer is empty. Where it is not, Debian's packages are the one source
//! every base image of ours can reach.

use std::path::Path;

use super::cargo::CargoBinary;
use super::detect::PythonInputs;
use super::manifest::{Language, PackageManager, Scripts};

/// Inputs of the inferred commands.
#[derive(Clone, Copy, Debug)]
pub struct Recipe<'a> {
    /// The project's language.
    pub language: Language,
    /// Its package manager, if it is a Node project.
    pub package_manager: PackageManager,
    /// Its entry; required for Python, else [`infer`] has nothing to start.
    pub entry: Option<&'a str>,
    /// Inputs of pip, if it is a Python project.
    pub python: PythonInputs,
    /// The binary that `cargo run` would run, if it is a Rust project and has one.
    pub binary: Option<&'a CargoBinary>,
}

/// The commands for `recipe`, or `None` for a Python project without an entry.
pub fn infer(recipe: Recipe<'_>) -> Option<Scripts> {
    let (setup, install, start) = match recipe.language {
        Language::TypeScript | Language::JavaScript => node(recipe),
        Language::Python => python(recipe.python, recipe.entry?),
        Language::Rust => rust(recipe.binary),
    };
    Some(Scripts {
        setup: Some(setup),
        install: Some(install),
        start,
    })
}

/// The image a project is built on unless its manifest names one.
pub fn base_image(
    language: Option<Language>,
    package_manager: Option<PackageManager>,
) -> &'static str {
    match (language, package_manager) {
        (Some(Language::Python), _) => "docker.io/iiidev/python:latest",
        (Some(Language::Rust), _) => "docker.io/library/rust:slim-bookworm",
        (_, Some(PackageManager::Bun)) => "docker.io/oven/bun:latest",
        _ => "docker.io/iiidev/node:latest",
    }
}

/// Installs `$packages`, so that `$tool` is there. It says what is wrong where there is no apt,
/// since "not found" would not.
macro_rules! apt_install {
    ($tool:literal, $($packages:literal)||+) => {
        concat!(
            "{ command -v apt-get >/dev/null || { echo 'the base image has no ",
            $tool,
            ", and no apt-get to install it with; name another in runtime.base_image' >&2; exit 1; }\n",
            "apt-get update && { false",
            $(
                " || DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates ",
                $packages,
            )+
            "; }; }"
        )
    };
}

const NODE_SETUP: &str = concat!(
    "{ command -v node && command -v npm; } >/dev/null || ",
    apt_install!("Node", "nodejs npm")
);

// -B, or looking would leave compiled modules in the layer.
const PYTHON_SETUP: &str = concat!(
    "python3 -IBc 'import ensurepip, pip, venv' 2>/dev/null || ",
    apt_install!(
        "Python with pip and venv",
        "python3 python3-pip python3-venv"
    )
);

// Debian's own cargo is older than most of today's crates accept. Releases that build browsers
// carry a current one too.
const RUST_SETUP: &str = concat!(
    "command -v cargo >/dev/null || ",
    apt_install!(
        "cargo",
        "cargo-web rustc-web gcc libc6-dev" || "cargo rustc gcc libc6-dev"
    )
);

// The worker executes what install built, so an edit is compiled beside the worker that runs. Where
// several binaries or none could be meant, cargo says so.
fn rust(binary: Option<&CargoBinary>) -> (String, String, String) {
    let mut install = String::from("cargo build --release");
    if let Some(package) = binary.and_then(|binary| binary.package.as_ref()) {
        install.push_str(" -p ");
        install.push_str(&shell_word(package));
    }
    let start = match binary {
        Some(binary) => shell_word(&format!("target/release/{}", binary.name)),
        None => "cargo run --release".to_owned(),
    };
    (RUST_SETUP.to_owned(), install, start)
}

// Major versions are pinned: a later major wants a newer Node than Debian's, and another lockfile
// format.
fn node(recipe: Recipe<'_>) -> (String, String, String) {
    let then = |tool, package| {
        format!("{NODE_SETUP}\ncommand -v {tool} >/dev/null || npm install -g {package}")
    };
    let entry = recipe.entry.map(shell_word);
    let start = |exec: &str, run: &str| match &entry {
        Some(entry) => format!("{exec} {entry}"),
        None => format!("{run} dev"),
    };
    // The start command finds a program that is installed for all projects as well; it downloads
    // nothing.
    let with_tsx = |install: &str| match &entry {
        Some(_) => {
            format!("{install}\n[ -e node_modules/.bin/tsx ] || npm install -g tsx@4")
        }
        None => install.to_owned(),
    };
    match recipe.package_manager {
        PackageManager::Npm => (
            NODE_SETUP.to_owned(),
            with_tsx("npm install"),
            start("npx tsx", "npm run"),
        ),
        PackageManager::Yarn => (
            then("yarn", "yarn@1"),
            with_tsx("yarn install"),
            start("yarn exec tsx", "yarn run"),
        ),
        PackageManager::Pnpm => (
            then("pnpm", "pnpm@10"),
            with_tsx("pnpm install"),
            start("pnpm exec tsx", "pnpm run"),
        ),
        PackageManager::Bun => (
            format!("command -v bun >/dev/null || {{ {NODE_SETUP}\nnpm install -g bun@1; }}"),
            "bun install".to_owned(),
            start("bun", "bun run"),
        ),
    }
}

fn python(inputs: PythonInputs, entry: &str) -> (String, String, String) {
    let mut install = String::from("python3 -I -m venv .venv");
    if inputs.package || inputs.requirements {
        install.push_str(" && .venv/bin/pip install");
    }
    if inputs.requirements {
        install.push_str(" -r requirements.txt");
    }
    if inputs.package {
        install.push_str(" -e .");
    }
    // `-m` takes a module; the path of a file there could only fail.
    let is_file = Path::new(entry)
        .extension()
        .is_some_and(|extension| extension == "py");
    let module = if is_file { "" } else { "-m " };
    let start = format!(".venv/bin/python {module}{}", shell_word(entry));
    (PYTHON_SETUP.to_owned(), install, start)
}

/// `text` as one word of a shell command.
fn shell_word(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./@%+:,".contains(&b);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}
