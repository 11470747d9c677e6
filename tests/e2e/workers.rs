//! The three examples with npm, pip and cargo, each from its first run to `--rebuild`.

use std::time::Duration;

use serde_json::json;

use crate::engine::Engine;
use crate::harness::{Home, NODE_IMAGE, Project, debian_base, repository, skip};

/// Downloads and, for Rust, a compilation from nothing.
const INSTALL: Duration = Duration::from_secs(1800);

struct Example {
    language: &'static str,
    base: &'static str,
    image: &'static str,
    /// The source file, and a word in it that only the reply shows.
    source: &'static str,
    /// The layers that an edit of the source redoes.
    source_redoes: &'static str,
    /// The dependency file, a line of it, and the same with one dependency more.
    dependencies: (&'static str, &'static str, &'static str),
    /// The same line with a dependency that does not exist.
    broken: &'static str,
    /// How the source uses the new dependency: text to replace, and by what.
    using: &'static [(&'static str, &'static str)],
}

#[test]
fn typescript() {
    journey(&Example {
        language: "typescript",
        base: "node",
        image: NODE_IMAGE,
        source: "src/index.ts",
        source_redoes: "project",
        dependencies: (
            "package.json",
            "\"iii-sdk\": \"0.22.1\",",
            "\"iii-sdk\": \"0.22.1\", \"ms\": \"2.1.3\",",
        ),
        broken: "\"iii-sdk\": \"0.22.1\", \"ms\": \"99.99.99\",",
        using: &[
            ("import {", "import ms from 'ms'\nimport {"),
            ("from TypeScript", "from ${ms('1h')}"),
        ],
    });
}

#[test]
fn python() {
    journey(&Example {
        language: "python",
        base: "python",
        image: "docker.io/iiidev/python:latest",
        source: "src/hello/__main__.py",
        // setuptools stats each module, and a stat is a look at the contents.
        source_redoes: "project install",
        dependencies: (
            "pyproject.toml",
            "[\"iii-sdk==0.22.1\"]",
            "[\"iii-sdk==0.22.1\", \"six==1.17.0\"]",
        ),
        broken: "[\"iii-sdk==0.22.1\", \"six==99.99.99\"]",
        using: &[
            ("import sys", "import sys\nimport six"),
            ("from Python", "from {3600000 if six.PY3 else 0}"),
        ],
    });
}

/// Here install compiles, so that it looks at the source too.
#[test]
fn rust() {
    journey(&Example {
        language: "rust",
        base: "rust",
        image: "docker.io/library/rust:slim-bookworm",
        source: "src/main.rs",
        source_redoes: "project install",
        dependencies: (
            "Cargo.toml",
            "schemars = \"0.8\"",
            "schemars = \"0.8\"\nitoa = \"1\"",
        ),
        broken: "schemars = \"0.8\"\nitoa = \"99\"",
        using: &[(
            "from Rust!\")",
            "from {}\", itoa::Buffer::new().format(3_600_000))",
        )],
    });
}

fn journey(example: &Example) {
    let base = match debian_base(example.base) {
        Ok(base) => base,
        Err(why) => return skip(&format!("examples/{}", example.language), &why),
    };
    let home = Home::new();
    home.run_within(
        &[
            "image",
            "import",
            base.to_str().unwrap(),
            "--as",
            example.image,
        ],
        Duration::from_secs(300),
    )
    .ok();
    let engine = Engine::start();
    let project = Project::copy(&repository("examples").join(example.language));
    let function = format!("hello::{}", example.language);
    let port = engine.port.to_string();

    // Runs the worker until it has answered one call, and returns the greeting.
    let greeting = |project: &Project, options: &[&str]| {
        let mut args = vec!["worker", "dev", project.arg(), "--port", &port];
        args.extend(options);
        let mut dev = home.start(&args);
        dev.wait_within("ready", INSTALL);
        engine.wait_for(&function, INSTALL);
        let reply = engine.invoke(&function, &json!({ "name": "test" }));
        dev.stop();
        engine.wait_gone(&function, Duration::from_secs(10));
        let message = reply["result"]["message"].as_str();
        message
            .unwrap_or_else(|| panic!("no greeting in {reply}"))
            .to_owned()
    };
    let build = |project: &Project, options: &[&str]| home.build_within(project, options, INSTALL);

    // The first run, and the same again.
    assert!(greeting(&project, &[]).starts_with("Hello, test, from "));
    let layers = build(&project, &[]);
    assert_eq!(layers.built(), "");
    assert!(greeting(&project, &[]).starts_with("Hello, test, from "));

    // A source edit.
    project.edit(example.source, "Hello", "Howdy");
    let layers = build(&project, &[]);
    assert_eq!(layers.built(), example.source_redoes, "{layers:#?}");
    assert!(greeting(&project, &[]).starts_with("Howdy, test, from "));

    // A second project with the same dependencies.
    let second = Project::copy(project.path());
    let layers = build(&second, &["--name", "second"]);
    assert_eq!(layers.get("install").status, "hit", "{layers:#?}");
    assert_eq!(layers.bytes(), 0, "{layers:#?}");

    // A dependency edit; then one that cannot be installed, which changes nothing for good.
    let (file, line, more) = example.dependencies;
    project.edit(file, line, more);
    let layers = build(&project, &[]);
    assert_eq!(layers.built(), "project install", "{layers:#?}");
    assert!(layers.reason().contains(file), "{:?}", layers.reason());
    for (old, new) in example.using {
        project.edit(example.source, old, new);
    }
    let with_dependency = greeting(&project, &[]);
    assert!(with_dependency.contains("3600000"), "{with_dependency}");

    project.edit(file, more, example.broken);
    home.run_within(&["worker", "build", project.arg()], INSTALL)
        .fails()
        .says(&["install"]);
    project.edit(file, example.broken, more);
    let layers = build(&project, &[]);
    assert_eq!(
        layers.get("install").status,
        "hit",
        "what held before the failure holds after it: {layers:#?}"
    );

    // The sandbox's files go, the layers stay.
    assert_eq!(greeting(&project, &["--fresh"]), with_dependency);
    assert_eq!(build(&project, &[]).built(), "");

    // All steps again.
    let layers = build(&project, &["--rebuild"]);
    assert!(layers.built().contains("install"), "{layers:#?}");
    assert_eq!(greeting(&project, &[]), with_dependency);

    // The same as a managed worker, which finds every layer there.
    let name = format!("hello-{}", example.language);
    let worker = |args: &[&str]| {
        let args = [&["worker"], args].concat();
        home.start(&args).finish(INSTALL).ok()
    };
    worker(&["add", "--no-wait", project.arg(), "--port", &port]).says(&["install  cached"]);
    worker(&["start", &name, "--port", &port]);
    engine.wait_for(&function, INSTALL);
    let reply = engine.invoke(&function, &json!({ "name": "test" }));
    assert_eq!(reply["result"]["message"], with_dependency);
    worker(&["remove", "-y", &name]);
    engine.wait_gone(&function, Duration::from_secs(10));
    home.assert_nothing_left();
}
