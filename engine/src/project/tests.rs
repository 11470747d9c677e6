//! Whole manifests and whole directories, with the messages people get.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use proptest::prelude::*;

use super::*;

fn manifest(text: impl AsRef<[u8]>) -> Result<Manifest, String> {
    Manifest::parse(Path::new("my/iii.worker.yaml"), text.as_ref())
        .map_err(|error| error.to_string())
}

#[track_caller]
fn rejects(text: impl AsRef<[u8]>, expected: &str) {
    let shown = String::from_utf8_lossy(text.as_ref()).into_owned();
    match manifest(text) {
        Ok(manifest) => panic!("accepted as {manifest:?}:\n{shown}"),
        Err(error) => assert_eq!(error, format!("my/iii.worker.yaml:{expected}"), "{shown}"),
    }
}

const FULL: &str = r#"# Everything at once
iii: v1
name: my-worker
description: "Adds numbers: fast"
runtime:
  kind: typescript
  language: typescript
  package_manager: pnpm
  entry: src/my entry.ts
  base_image: ghcr.io/org/img:1@sha256:00
resources:
  memory: 4096
  cpus: 4
network:
  host_loopback: [6379, 5432]
scripts:
  setup: |
    apt-get update
    apt-get install -y build-essential

    echo "done: $?"
  install: >-
    pnpm install
    --frozen-lockfile
  start: pnpm start
env:
  LOG_LEVEL: debug
  EMPTY: ""
  PORT: "3000"
  III_URL: ws://elsewhere
  III_ENGINE_URL: ws://elsewhere
dependencies:
  http: "^0.20"
  state: ~0.5.0
config:
  url: "${DB:x}"
  pool: {size: 5, ratio: 0.5, on: true, off: null}
  list: [1, two]
tags:
  - math
"#;

#[test]
fn every_field_is_read() {
    let manifest = manifest(FULL).unwrap();
    assert_eq!(manifest.name.as_str(), "my-worker");
    assert_eq!(manifest.description.as_deref(), Some("Adds numbers: fast"));
    assert_eq!(
        manifest.runtime,
        Runtime {
            kind: Some(Language::TypeScript),
            package_manager: Some(PackageManager::Pnpm),
            entry: Some("src/my entry.ts".into()),
            base_image: Some("ghcr.io/org/img:1@sha256:00".into()),
        }
    );
    assert_eq!(
        manifest.resources,
        Resources {
            memory_mib: 4096,
            cpus: 4
        }
    );
    let loopback = HostLoopback {
        all: false,
        ports: [5432, 6379].into(),
    };
    assert_eq!(manifest.host_loopback, loopback);
    assert_eq!(
        manifest.scripts,
        Some(Scripts {
            setup: Some(
                "apt-get update\napt-get install -y build-essential\n\necho \"done: $?\"\n".into()
            ),
            install: Some("pnpm install --frozen-lockfile".into()),
            start: "pnpm start".into(),
        })
    );
    let env: Vec<_> = manifest
        .env
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    assert_eq!(env, ["EMPTY=", "LOG_LEVEL=debug", "PORT=3000"]);
    let dependencies: Vec<_> = manifest
        .dependencies
        .iter()
        .map(|(k, v)| format!("{k} {v}"))
        .collect();
    assert_eq!(dependencies, ["http ^0.20", "state ~0.5.0"]);
    assert_eq!(
        manifest.config.unwrap().to_string(),
        r#"{"list":[1,"two"],"pool":{"off":null,"on":true,"ratio":0.5,"size":5},"url":"${DB:x}"}"#
    );
    assert_eq!(
        manifest.warnings,
        [
            "my/iii.worker.yaml:30: env.III_URL: set by iii itself; the manifest's value is ignored",
            "my/iii.worker.yaml:31: env.III_ENGINE_URL: set by iii itself; the manifest's value is ignored",
        ]
    );
}

#[test]
fn what_is_left_out_has_its_default() {
    for text in [
        "name: w",
        "name: w\r\n",
        "---\nname: w\n...\n",
        "\u{feff}name: w\n",
        "{name: w}",
        "name: !!str w",
        "name: w\nruntime:\nresources:\nscripts:\nenv:\ndependencies: ~\nconfig: null\ndescription:\n",
        "name: w\nruntime: {}\nresources: {}\nenv: {}\nconfig:",
        "name: w\nruntime: {kind: , entry: }\nresources: {memory: }",
    ] {
        let found = manifest(text).unwrap();
        assert_eq!(found.name.as_str(), "w", "{text:?}");
        assert_eq!(found.runtime, Runtime::default(), "{text:?}");
        assert_eq!(
            (found.resources.memory_mib, found.resources.cpus),
            (2048, 2)
        );
        assert_eq!(found.scripts, None, "{text:?}");
        assert!(found.env.is_empty() && found.warnings.is_empty() && found.config.is_none());
    }
}

#[test]
fn line_endings_of_windows_do_not_reach_the_shell() {
    let found = manifest("name: w\r\nscripts:\r\n  start: |\r\n    one\r\n    two\r\n").unwrap();
    assert_eq!(found.scripts.unwrap().start, "one\ntwo\n");
}

#[test]
fn aliases_work_within_reason() {
    let found = manifest("name: w\nenv:\n  A: &a 'x'\n  B: *a\nscripts:\n  start: *a").unwrap();
    assert_eq!(found.env["B"], "x");
    assert_eq!(found.scripts.unwrap().start, "x");
}

#[test]
fn unknown_keys() {
    rejects(
        "name: w\nscript: {}",
        "2: script: unknown key; did you mean `scripts`?",
    );
    rejects(
        "name: w\nenvs: {}",
        "2: envs: unknown key; did you mean `env`?",
    );
    rejects(
        "name: w\nruntime:\n  Kind: python",
        "3: runtime.Kind: unknown key; did you mean `runtime.kind`?",
    );
    rejects(
        "name: w\nruntime:\n  base-image: x",
        "3: runtime.base-image: unknown key; did you mean `runtime.base_image`?",
    );
    rejects(
        "name: w\nentry: x",
        "2: entry: unknown key; did you mean `runtime.entry`?",
    );
    rejects(
        "name: w\nstart: x",
        "2: start: unknown key; did you mean `scripts.start`?",
    );
    rejects(
        "name: w\nruntime: {memory: 5}",
        "2: runtime.memory: unknown key; did you mean `resources.memory`?",
    );
    rejects(
        "name: w\nnetwork: {host_loopback: all, dns: x}",
        "2: network.dns: unknown key; the keys known here are host_loopback",
    );
    for wrong in ["[0]", "[65536]", "[\"80\"]", "[all]", "[[80]]"] {
        let error = manifest(format!("name: w\nnetwork: {{host_loopback: {wrong}}}"));
        let error = error.unwrap_err();
        assert!(error.contains("is no port"), "{error}");
    }
    rejects(
        "name: w\nnetwork: {host_loopback: 80}",
        "2: network.host_loopback: expected `all` or a list of ports from 1 to 65535; found the number 80",
    );
    rejects(
        "name: w\nresources:\n  disk: 5",
        "3: resources.disk: unknown key; the keys known here are memory, cpus",
    );
    rejects(
        "name: w\nscripts:\n  start: a\n  prestart: b",
        "4: scripts.prestart: unknown key; the keys known here are setup, install, start",
    );
    rejects(
        "name: w\nzzz: b",
        "2: zzz: unknown key; the keys known here are name, description, runtime, resources, network, scripts, env, \
         dependencies, config, iii, deploy, manifest, tags",
    );
    // A terminal's control sequences do not come out as such.
    let error = manifest("name: w\nresources: {\"\\e[31m\": 5}").unwrap_err();
    assert!(
        error.contains(r"resources.\u{1b}[31m: unknown key"),
        "{error}"
    );
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn wrong_types_and_values() {
    rejects(
        "name: w\n\n\n\n\nruntime:\n  kind: tsx",
        "7: runtime.kind: expected one of typescript, javascript, python, rust; found \"tsx\"",
    );
    rejects(
        "name: w\nruntime: {language: typscript}",
        "2: runtime.language: expected one of typescript, javascript, python, rust; found \"typscript\"; \
         did you mean typescript?",
    );
    rejects(
        "name: w\nruntime: {package_manager: [npm]}",
        "2: runtime.package_manager: expected one of npm, yarn, pnpm, bun; found a list",
    );
    rejects(
        "name: w\nruntime:\n  kind: python\n  language: rust",
        "4: runtime.language: \"rust\": contradicts runtime.kind, which is python; remove one of them",
    );
    rejects(
        "name: w\nruntime: node",
        "2: runtime: expected a mapping; found \"node\"",
    );
    rejects(
        "name: w\nruntime:\n  entry: \"\"",
        "3: runtime.entry: \"\": name the file that starts the worker, relative to the project",
    );
    rejects(
        "name: w\nruntime: {entry: --eval}",
        "2: runtime.entry: \"--eval\": a path that starts with `-` would be taken for an option",
    );
    rejects(
        "name: w\nruntime: {entry: \"a\\nb\"}",
        "2: runtime.entry: \"a\\nb\": contains a control character",
    );
    for image in ["a b", "-x", "", "a$(b)", "/x"] {
        let expected = format!(
            "2: runtime.base_image: {image:?}: not an image reference such as docker.io/library/node:24-slim"
        );
        rejects(
            format!("name: w\nruntime: {{base_image: {image:?}}}"),
            &expected,
        );
    }
    rejects(
        "name: w\nresources: {memory: 2g}",
        "2: resources.memory: expected a whole number of MiB from 64 to 1048576; found \"2g\"",
    );
    rejects(
        "name: w\nresources: {memory: \"2048\"}",
        "2: resources.memory: expected a whole number of MiB from 64 to 1048576; found \"2048\"",
    );
    for (cpus, found) in [
        ("0", "the number 0"),
        ("-1", "the number -1"),
        ("256", "the number 256"),
        ("2.5", "the number 2.5"),
        ("99999999999999999999", "the number 99999999999999999999"),
        ("true", "the boolean true"),
        ("{}", "a mapping"),
    ] {
        let expected =
            format!("2: resources.cpus: expected a whole number from 1 to 255; found {found}");
        rejects(format!("name: w\nresources: {{cpus: {cpus}}}"), &expected);
    }
    rejects(
        "name: w\nenv:\n  A: a\n  PORT: 3000",
        "4: env.PORT: expected a string (put it in quotes); found the number 3000",
    );
    rejects(
        "name: w\nenv:\n  DEBUG: yes\n  ON: true",
        "4: env.ON: expected a string (put it in quotes); found the boolean true",
    );
    rejects(
        "name: w\nenv:\n  A:",
        "3: env.A: expected a string; found nothing",
    );
    rejects(
        "name: w\nenv:\n  A: {B: c}",
        "3: env.A: expected a string; found a mapping",
    );
    rejects(
        "name: w\nenv: [A=b]",
        "2: env: expected a mapping; found a list",
    );
    rejects(
        "name: w\nenv: {\"A=B\": c}",
        "2: env.A=B: \"A=B\": a variable's name is not empty and has neither `=` nor NUL in it",
    );
    rejects(
        "name: w\nenv: {A: \"b\\0c\"}",
        "2: env.A: \"b\\0c\": contains a NUL character",
    );
    rejects(
        "name: w\nscripts: {start: [a]}",
        "2: scripts.start: expected a string; found a list",
    );
    rejects(
        "name: w\nscripts: npm start",
        "2: scripts: expected a mapping; found \"npm start\"",
    );
    rejects(
        "name: w\nconfig: [a]",
        "2: config: expected a mapping; found a list",
    );
    rejects(
        "name: w\ndescription: 5",
        "2: description: expected a string (put it in quotes); found the number 5",
    );
    rejects(
        "name: w\ndependencies:\n  http: 0.20",
        "3: dependencies.http: expected a string (put it in quotes); found the number 0.20",
    );
    rejects(
        "name: w\ndependencies: {w: \"1\"}",
        "2: dependencies.w: \"1\": a worker cannot depend on itself",
    );
    rejects(
        "name: w\ndependencies: {../x: \"1\"}",
        "2: dependencies.../x: \"../x\": contains '/'; letters, digits, `.`, `_` and `-` are allowed",
    );
}

#[test]
fn what_is_missing() {
    let why = "name: missing; every manifest names its worker, for example `name: my-worker`";
    rejects("", &format!("1: {why}"));
    rejects("# nothing\n", &format!("1: {why}"));
    rejects("description: d", &format!("1: {why}"));
    rejects("name:", &format!("1: {why}"));
    let why = "scripts.start: missing; nothing is inferred once `scripts` is given, so say what starts the worker";
    rejects("name: w\nscripts: {}", &format!("2: {why}"));
    rejects("name: w\nscripts:\n  install: npm ci", &format!("2: {why}"));
    rejects(
        "name: w\nscripts:\n  install: npm ci\n  start: ' '",
        &format!("4: {why}"),
    );
}

#[test]
fn bad_names() {
    rejects(
        "name: a b",
        "1: name: \"a b\": contains ' '; letters, digits, `.`, `_` and `-` are allowed",
    );
    rejects(
        "name: ../../etc",
        "1: name: \"../../etc\": contains '/'; letters, digits, `.`, `_` and `-` are allowed",
    );
    rejects(
        "name: .a",
        "1: name: \".a\": does not start with a letter or a digit",
    );
    rejects("name: ''", "1: name: \"\": is empty");
    rejects(
        "name: 123",
        "1: name: expected a string (put it in quotes); found the number 123",
    );
    rejects(
        format!("name: {}", "x".repeat(65)),
        &format!(
            "1: name: \"{}…\": is longer than 64 characters",
            "x".repeat(60)
        ),
    );
}

#[test]
fn broken_yaml() {
    rejects(
        "- a",
        "1: expected `key: value` lines at the top level; found a list",
    );
    rejects(
        "just text",
        "1: expected `key: value` lines at the top level; found \"just text\"",
    );
    rejects(
        "name: w\nname: v",
        "2: duplicate key `name`, first given on line 1",
    );
    rejects(
        "name: w\nenv:\n  A: a\n  B: b\n  A: c",
        "5: duplicate key `A`, first given on line 3",
    );
    rejects(
        "name: w\n---\nname: v",
        "2: a second YAML document starts here; only one is allowed",
    );
    rejects("name: w\n? [a]\n: b", "2: a key must be a word, not a list");
    rejects(
        "name: w\nenv: !include secrets.yaml",
        "2: the tag `!include` is not supported",
    );
    rejects(
        "name: w\nconfig: &a\n  b: *a",
        "3: an alias refers to the value that contains it",
    );
    for (text, line) in [
        ("name: w\nenv:\n\tA: b", 3),
        ("name: \"w", 1),
        ("name: w\nenv: {A: b", 3),
        ("name: w\n  env: a", 2),
        ("name: *nowhere", 1),
        ("name: @w", 1),
    ] {
        let error = manifest(text).unwrap_err();
        let at = error.strip_prefix("my/iii.worker.yaml:").unwrap();
        let (found, message) = at.split_once(": ").unwrap();
        assert!(message.starts_with("invalid YAML: "), "{text:?}: {error}");
        assert!(
            found.parse::<usize>().unwrap().abs_diff(line) <= 1,
            "{text:?}: {error}"
        );
    }
}

#[test]
fn wrong_encodings() {
    rejects(
        b"name: w\nenv:\n  A: caf\xe9\n",
        "3: not UTF-8 (byte 0xe9); save the file as UTF-8",
    );
    rejects(
        b"\xff\xfen\0a\0",
        "1: not UTF-8 (byte 0xff); save the file as UTF-8",
    );
    assert!(manifest("name: w\ndescription: café ☃").is_ok());
}

#[test]
fn bombs_stay_small() {
    // Nine levels of nine aliases: a billion values.
    let mut billion = String::from("name: w\nconfig:\n  a: &a [x,x,x,x,x,x,x,x,x]\n");
    for (from, to) in "abcdefghi".chars().zip("bcdefghij".chars()) {
        let list = [format!("*{from}").as_str()].repeat(9).join(",");
        writeln!(billion, "  {to}: &{to} [{list}]").unwrap();
    }
    let error = manifest(&billion).unwrap_err();
    assert!(
        error.contains("its aliases expand to more than 8388608 bytes"),
        "{error}"
    );

    // One long text, many times.
    let quadratic = format!(
        "name: w\nconfig:\n  a: &a {}\n  b: [{}]",
        "x".repeat(40_000),
        ["*a"].repeat(1_000).join(",")
    );
    let error = manifest(&quadratic).unwrap_err();
    assert!(error.contains("its aliases expand to"), "{error}");

    // Depth, written out and by aliases of aliases.
    let deep = |n: usize| format!("name: w\nconfig: {{a: {}{}}}", "[".repeat(n), "]".repeat(n));
    assert!(manifest(deep(30)).is_ok());
    rejects(deep(31), "2: nested more than 32 levels deep");
    assert!(manifest(deep(30_000)).is_err());
    let chained = "name: w\nconfig:\n  a: &a [[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]\n  b: &b [[[[[[[[[[[[[[[*a]]]]]]]]]]]]]]]\n  c: [*b]";
    rejects(chained, "5: nested more than 32 levels deep");

    // Many keys are not quadratic.
    let many: Vec<String> = (0..8_000).map(|i| format!("  k{i}: v")).collect();
    let many = many.join("\n");
    assert_eq!(
        manifest(format!("name: w\nenv:\n{many}"))
            .unwrap()
            .env
            .len(),
        8_000
    );
}

#[test]
fn package_managers_are_for_node() {
    let found = manifest("name: w\nruntime:\n  kind: python\n  package_manager: npm").unwrap();
    assert_eq!(found.runtime.package_manager, None);
    assert_eq!(
        found.warnings,
        ["my/iii.worker.yaml:4: runtime.package_manager: ignored: it means nothing for python"]
    );
}

proptest! {
    // Long enough to reach every production of YAML, short enough to run with the rest.
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_bytes_make_it_panic(
        pieces in proptest::collection::vec(
            prop_oneof![
                proptest::sample::select(vec![
                    "name: w\n", "runtime:", "  ", "\n", "- ", ": ", "? ", "&a ", "*a", "!", "!!str ", "|", ">-", "[", "]",
                    "{", "}", ",", "\"", "'", "#", "---\n", "...\n", "%TAG ! x\n", "\t", "\r", "~", "env:", "A", "\u{feff}", "<<",
                ]).prop_map(|s: &str| s.as_bytes().to_vec()),
                proptest::collection::vec(any::<u8>(), 0..3),
            ],
            0..30,
        )
    ) {
        if let Err(error) = manifest(pieces.concat()) {
            prop_assert!(error.starts_with("my/iii.worker.yaml:"));
            prop_assert!(!error.contains(char::is_control), "{}", error);
        }
    }
}

/// A project directory with these files; a name that ends in `/` is a directory.
fn project(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        if name.ends_with('/') {
            fs::create_dir_all(path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }
    dir
}

fn open(dir: &tempfile::TempDir) -> Result<Project, String> {
    Project::open(dir.path()).map_err(|error| {
        error
            .to_string()
            .replace(&dir.path().display().to_string(), "DIR")
    })
}

/// install | start | image
fn inferred(files: &[(&str, &str)]) -> String {
    match open(&project(files)) {
        Ok(project) => {
            assert!(project.warnings.is_empty(), "{:?}", project.warnings);
            let Scripts { install, start, .. } = project.scripts;
            format!(
                "{} | {start} | {}",
                install.unwrap_or_default(),
                project.base_image
            )
        }
        Err(error) => error,
    }
}

/// Added to install where the start command is tsx.
const TSX: &str = "\n[ -e node_modules/.bin/tsx ] || npm install -g tsx@4";

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn commands_are_inferred() {
    let node = "docker.io/iiidev/node:latest";
    let python = "docker.io/iiidev/python:latest";
    let with = |runtime: &str| format!("name: w\nruntime: {{{runtime}}}");
    let package = ("package.json", "{}");
    let yaml = MANIFEST_NAME;
    for (files, expected) in [
        (vec![package], format!("npm install | npm run dev | {node}")),
        (
            vec![package, ("yarn.lock", "")],
            format!("yarn install | yarn run dev | {node}"),
        ),
        (
            vec![package, ("pnpm-lock.yaml", "")],
            format!("pnpm install | pnpm run dev | {node}"),
        ),
        (
            vec![package, ("bun.lockb", "")],
            "bun install | bun run dev | docker.io/oven/bun:latest".into(),
        ),
        (
            vec![package, (yaml, &with("entry: src/index.ts"))],
            format!("npm install{TSX} | npx tsx src/index.ts | {node}"),
        ),
        (
            vec![(
                yaml,
                &with("kind: typescript, package_manager: yarn, entry: a.ts"),
            )],
            format!("yarn install{TSX} | yarn exec tsx a.ts | {node}"),
        ),
        (
            vec![
                package,
                ("yarn.lock", ""),
                (yaml, &with("package_manager: pnpm, entry: a.ts")),
            ],
            format!("pnpm install{TSX} | pnpm exec tsx a.ts | {node}"),
        ),
        (
            vec![(yaml, &with("package_manager: bun, entry: a.ts"))],
            "bun install | bun a.ts | docker.io/oven/bun:latest".into(),
        ),
        (
            vec![package, (yaml, &with("entry: \"it's; rm -rf $HOME.ts\""))],
            format!("npm install{TSX} | npx tsx 'it'\\''s; rm -rf $HOME.ts' | {node}"),
        ),
        (
            vec![package, (yaml, &with("base_image: \"ghcr.io/o/i:1\""))],
            "npm install | npm run dev | ghcr.io/o/i:1".into(),
        ),
        (
            vec![("pyproject.toml", ""), (yaml, &with("entry: my_module"))],
            format!(
                "python3 -I -m venv .venv && .venv/bin/pip install -e . | .venv/bin/python -m my_module | {python}"
            ),
        ),
        (
            vec![
                ("pyproject.toml", ""),
                ("src/pkg/__main__.py", ""),
                ("src/lib/__init__.py", ""),
            ],
            format!(
                "python3 -I -m venv .venv && .venv/bin/pip install -e . | .venv/bin/python -m pkg | {python}"
            ),
        ),
        (
            vec![("requirements.txt", ""), ("main.py", "")],
            format!(
                "python3 -I -m venv .venv && .venv/bin/pip install -r requirements.txt | .venv/bin/python main.py | {python}"
            ),
        ),
        (
            vec![
                ("requirements.txt", ""),
                ("pyproject.toml", ""),
                ("app.py", ""),
            ],
            format!(
                "python3 -I -m venv .venv && .venv/bin/pip install -r requirements.txt -e . | .venv/bin/python app.py | {python}"
            ),
        ),
        (
            vec![(yaml, &with("kind: python, entry: w"))],
            format!("python3 -I -m venv .venv | .venv/bin/python -m w | {python}"),
        ),
        (
            vec![("Cargo.toml", "")],
            "cargo build --release | cargo run --release | docker.io/library/rust:slim-bookworm"
                .into(),
        ),
        (
            vec![
                ("Cargo.toml", "[package]\nname = \"app\""),
                ("src/main.rs", ""),
            ],
            "cargo build --release | target/release/app | docker.io/library/rust:slim-bookworm"
                .into(),
        ),
        (
            vec![
                ("Cargo.toml", "[workspace]\nmembers = [\"a\"]"),
                ("a/Cargo.toml", "[package]\nname = \"app\""),
                ("a/src/main.rs", ""),
            ],
            "cargo build --release -p app | target/release/app | docker.io/library/rust:slim-bookworm"
                .into(),
        ),
        (
            vec![package, (yaml, "name: w\nscripts: {start: node x.js}")],
            format!(" | node x.js | {node}"),
        ),
        (
            vec![(yaml, "name: w\nscripts: {start: ./run}")],
            format!(" | ./run | {node}"),
        ),
    ] {
        assert_eq!(inferred(&files), expected, "{files:?}");
    }
}

#[test]
fn setup_does_nothing_where_the_tool_is() {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;
    let tools = tempfile::tempdir().unwrap();
    for tool in ["node", "npm", "yarn", "pnpm", "bun", "cargo", "python3"] {
        let path = tools.path().join(tool);
        fs::write(
            &path,
            "#!/bin/sh\n[ $# != 3 ] || { echo npm install >&2; exit 1; }\n",
        )
        .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let lock = [
        vec![("package.json", "")],
        vec![("package.json", ""), ("yarn.lock", "")],
        vec![("package.json", ""), ("pnpm-lock.yaml", "")],
        vec![("package.json", ""), ("bun.lock", "")],
        vec![("Cargo.toml", "")],
        vec![("requirements.txt", ""), ("main.py", "")],
    ];
    for files in lock {
        let setup = open(&project(&files)).unwrap().scripts.setup.unwrap();
        let run = |path: &Path| {
            Command::new("/bin/sh")
                .args(["-e", "-c", &setup])
                .env("PATH", path)
                .output()
                .unwrap()
        };
        let present = run(tools.path());
        assert!(present.status.success(), "{setup}: {present:?}");
        assert!(present.stderr.is_empty(), "{setup}: {present:?}");
        // And without tool and apt, it says what is missing.
        let absent = run(Path::new("/nonexistent"));
        let message = String::from_utf8_lossy(&absent.stderr);
        assert_eq!(absent.status.code(), Some(1), "{setup}: {message}");
        assert!(
            message
                .contains("and no apt-get to install it with; name another in runtime.base_image"),
            "{message}"
        );
    }
}

#[test]
fn directories_that_are_no_project() {
    let known = "iii.worker.yaml, package.json (Node), Cargo.toml (Rust), pyproject.toml or requirements.txt (Python)";
    for (files, expected) in [
        (vec![], format!("DIR is empty; a project has {known}")),
        (vec![("README.md", "")], format!("DIR is no project that is known; looked for {known}")),
        (vec![("package.json/", "")], format!("DIR is no project that is known; looked for {known}")),
        (
            vec![(MANIFEST_NAME, "name: w")],
            "DIR/iii.worker.yaml: the project's language is unknown; give runtime.kind or scripts, or add package.json, \
             Cargo.toml, pyproject.toml or requirements.txt"
                .into(),
        ),
        (
            vec![("requirements.txt", ""), ("other.py", "")],
            "DIR: nothing says what starts this Python project; add main.py, worker.py, app.py, src/main.py, __main__.py \
             or one package with a __main__.py, or name the file or module as runtime.entry in iii.worker.yaml"
                .into(),
        ),
        (vec![("iii.worker.yaml/", "")], "DIR/iii.worker.yaml: is not a regular file".into()),
        (
            vec![(MANIFEST_NAME, &"#".repeat(65 << 10))],
            "DIR/iii.worker.yaml: larger than the 65536 bytes allowed for this file".into(),
        ),
    ] {
        assert_eq!(open(&project(&files)).unwrap_err(), expected);
    }
    let dir = project(&[("file", "")]);
    let fail = |name: &str| {
        let error = Project::open(&dir.path().join(name)).unwrap_err();
        error
            .to_string()
            .replace(&dir.path().display().to_string(), "DIR")
    };
    assert_eq!(fail("nowhere"), "no such directory: DIR/nowhere");
    assert_eq!(
        fail("file"),
        "DIR/file is not a directory; name the directory that holds the project"
    );
    assert_eq!(
        fail("file/x"),
        "DIR/file/x is not a directory; name the directory that holds the project"
    );
    symlink("loop", dir.path().join("loop")).unwrap();
    assert_eq!(fail("loop"), "cannot open DIR/loop");
    symlink("nowhere", dir.path().join(MANIFEST_NAME)).unwrap();
    assert_eq!(
        open(&dir).unwrap_err(),
        "DIR/iii.worker.yaml: cannot be read"
    );
}

#[test]
fn a_manifest_of_exactly_the_cap_is_read() {
    let mut text = String::from("name: w\nscripts: {start: x}\n#");
    text.push_str(&"x".repeat((64 << 10) - text.len()));
    assert!(open(&project(&[(MANIFEST_NAME, &text)])).is_ok());
    text.push('x');
    assert!(open(&project(&[(MANIFEST_NAME, &text)])).is_err());
}

#[test]
fn a_fifo_for_a_manifest_does_not_hang() {
    let dir = project(&[("package.json", "")]);
    let path = dir.path().join(MANIFEST_NAME);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert_eq!(
        open(&dir).unwrap_err(),
        "DIR/iii.worker.yaml: is not a regular file"
    );
}

#[test]
fn the_root_and_the_name_come_from_the_real_directory() {
    let dir = project(&[("my app/package.json", ""), ("my app/iii.worker.yml", "")]);
    symlink("my app", dir.path().join("link")).unwrap();
    let opened = Project::open(&dir.path().join("link/.")).unwrap();
    assert_eq!(
        opened.root,
        fs::canonicalize(dir.path()).unwrap().join("my app")
    );
    assert_eq!(opened.dev_name().as_str(), "iii-dev-my-app");
    assert_eq!(opened.name, None);
    assert_eq!(opened.warnings.len(), 1);
    assert!(opened.warnings[0].ends_with("not read; the manifest is named iii.worker.yaml"));
}

#[test]
fn resources_of_small_machines() {
    let of = |(memory_mib, cpus)| Resources { memory_mib, cpus };
    for (asked, there, given) in [
        ((2048, 2), (8000, 8), Some((2048, 2))),
        ((8000, 8), (8000, 8), Some((8000, 8))),
        ((8001, 8), (8000, 8), None),
        ((64, 255), (8000, 8), Some((64, 8))),
        ((2048, 2), (1900, 1), Some((1900, 1))),
        ((2049, 1), (1900, 1), None),
        ((1 << 20, 1), (8000, 8), None),
    ] {
        let (memory, cpus) = there;
        assert_eq!(
            of(asked).within(memory, cpus),
            given.map(of),
            "{asked:?} of {there:?}"
        );
    }
}
