//! Installs run again exactly when something that they looked at changed, and the true reason is
//! said.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::harness::{Home, LIMIT, Project};

/// A project whose install is `script`.
fn project(script: &str, files: &[(&str, &str)]) -> Project {
    let project = Project::scripts(":", script, "cat /opt/out");
    for (path, text) in files {
        project.write(path, text);
    }
    project
}

/// Whether install ran.
fn installs(home: &Home, project: &Project) -> bool {
    home.build(project, &[]).get("install").status == "built"
}

/// A file that install only stats, links, renames, deletes or writes over is an input as one that
/// it reads is.
#[test]
fn a_file_that_is_only_touched_is_an_input() {
    let home = Home::with_busybox();
    for (script, path) in [
        ("mkdir -p /opt; ln a.txt /opt/out", "a.txt"),
        ("mkdir -p /opt; mv b.txt /opt/out", "b.txt"),
        (
            "mkdir -p /opt; mv dir /opt/dir; mv /opt/dir/c.txt /opt/out",
            "dir/c.txt",
        ),
        (
            "mkdir -p /opt; if [ -s d.txt ]; then echo yes; else echo no; fi > /opt/out",
            "d.txt",
        ),
        ("mkdir -p /opt; stat -c %s e.txt > /opt/out", "e.txt"),
        ("mkdir -p /opt; rm f.txt; echo > /opt/out", "f.txt"),
        ("mkdir -p /opt; echo x > g.txt; echo > /opt/out", "g.txt"),
    ] {
        let project = project(script, &[(path, "one\n"), ("other.txt", "1")]);
        assert!(installs(&home, &project), "{script}");
        project.write("other.txt", "2");
        assert!(!installs(&home, &project), "{script}");
        project.write(path, "");
        assert!(installs(&home, &project), "{script}");
    }
}

/// The same commit under another umask is the same project to a step.
#[test]
fn a_umask_is_no_change() {
    let home = Home::with_busybox();
    let project = project(
        "mkdir -p /opt; cat a.txt run.sh > /opt/out; ls -R . > /dev/null",
        &[
            ("a.txt", "a"),
            ("run.sh", "#!/bin/sh\n"),
            ("dir/b.txt", "b"),
        ],
    );
    let chmod = |path: &str, mode| {
        let path = project.path().join(path);
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    chmod("run.sh", 0o755);
    home.build(&project, &[]);
    for (file, exec, dir) in [(0o664, 0o775, 0o775), (0o600, 0o700, 0o700)] {
        chmod("a.txt", file);
        chmod("run.sh", exec);
        chmod("dir", dir);
        assert!(!installs(&home, &project));
    }
    chmod("run.sh", 0o644);
    assert!(installs(&home, &project));
}

/// Changes that install makes in the project's own files are there at start, until the project
/// changes these files.
#[test]
fn what_install_changes_in_the_project_is_there_at_start() {
    let home = Home::with_busybox();
    let install = "chmod +x run.sh; echo completed >> lock; rm -rf old";
    let project = Project::scripts(":", install, "./run.sh");
    project.write("run.sh", "#!/bin/sh\ncat lock; ls; echo done\n");
    project.write("lock", "mine\n");
    project.write("old/a", "a");
    let shows = |lock: &str| {
        let ran = home.dev(&project, &[]).finish(LIMIT).ok();
        let want = format!("{lock}\ncompleted\niii.worker.yaml\nlock\nrun.sh\ndone\n");
        assert_eq!(ran.stdout, want);
    };
    shows("mine");
    shows("mine");
    project.write("lock", "yours\n");
    shows("yours");
}

/// A package that the worker changed gives way to a newer install, and that is said.
#[test]
fn a_newer_install_wins_over_what_the_worker_changed() {
    let home = Home::with_busybox();
    let install =
        "mkdir -p node_modules/ms; cat version | tee node_modules/ms/a > node_modules/ms/b";
    let start = "cat node_modules/ms/*; [ -e own ] && cat own; \
                 for f in node_modules/ms/a own; do echo mine > $f; done";
    let project = Project::scripts(":", install, start);
    project.write("version", "1\n");
    let ran = || home.dev(&project, &[]).finish(LIMIT);
    assert_eq!(ran().ok().stdout, "1\n1\n");
    assert_eq!(ran().ok().stdout, "mine\n1\nmine\n");
    project.write("version", "2\n");
    let newer = ran().ok().says(&["1 file", "gave way", "--fresh"]);
    assert_eq!(newer.stdout, "2\n2\nmine\n");
}

/// Two projects with one script install side by side: neither waits for the other.
#[test]
fn only_equal_work_waits() {
    let home = Home::with_busybox();
    let projects = ["one", "two"].map(|name| {
        let project = Project::scripts(":", "cat a > /dev/null; sleep 5", "true");
        project.write("a", name);
        project
    });
    // Setup is equal work, and built once beforehand.
    let _ = home.build(&Project::scripts(":", ":", "true"), &[]);
    let mut running = Vec::new();
    for (n, project) in projects.iter().enumerate() {
        let name = format!("box-{n}");
        running.push(home.start(&["worker", "build", project.arg(), "--name", &name]));
    }
    for run in running {
        let ended = run.finish(LIMIT).ok();
        assert!(!ended.stderr.contains("waiting"), "{}", ended.stderr);
    }
}

/// Projects with one script on one base do not drive each other's layers out, and each is told its
/// own reason.
#[test]
fn twenty_projects_with_one_script_all_hit_and_know_their_own_reasons() {
    let home = Home::with_busybox();
    let script = "mkdir -p /opt; cat package.json > /opt/out; ls src > /dev/null";
    let projects: Vec<Project> = (0..20)
        .map(|n| {
            let (text, own) = (format!("{n}\n"), format!("src/own-{n}"));
            project(script, &[("package.json", &*text), (&*own, "x")])
        })
        .collect();
    for (n, project) in projects.iter().enumerate() {
        let layers = home.build(project, &["--name", &format!("facts-{n}")]);
        assert_eq!(
            layers.reason(),
            "first build of this project with this script"
        );
    }
    for (n, project) in projects.iter().enumerate() {
        let layers = home.build(project, &["--name", &format!("facts-{n}")]);
        assert_eq!(layers.built(), "", "{n}");
    }
    projects[3].write("package.json", "new");
    let layers = home.build(&projects[3], &["--name", "facts-3"]);
    assert_eq!(layers.reason(), "package.json changed");
    projects[4].write("src/more", "new");
    let layers = home.build(&projects[4], &["--name", "facts-4"]);
    assert_eq!(layers.reason(), "the entries of src changed");
}

/// `explain` runs nothing, and agrees with the next build about records, reasons and facts.
#[test]
fn explain_tells_of_the_record_that_holds_or_of_the_facts_that_differ() {
    let home = Home::with_busybox();
    let script = "mkdir -p /opt; cat package.json > /opt/out; [ ! -e lock ]; ls src > /dev/null";
    let [one, two] = ["one\n", "two\n"].map(|text| {
        project(
            script,
            &[("package.json", text), ("src/a", "a"), ("other", "1")],
        )
    });
    let explain = |project: &Project| -> serde_json::Value {
        let ended = home
            .run(&["worker", "explain", project.arg(), "--json"])
            .ok();
        serde_json::from_str(&ended.stdout).unwrap()
    };
    let steps = |project: &Project| {
        let told = explain(project);
        [0, 1].map(|step| told["steps"][step].clone())
    };
    let [setup, install] = steps(&one);
    assert_eq!(setup["verdict"], "run");
    assert_eq!(
        setup["reason"],
        "first build of this project with this script"
    );
    assert_eq!(
        (&install["verdict"], &install["key"]),
        (&"unknown".into(), &().into())
    );

    let built = home.build(&one, &[]);
    one.write("other", "2");
    let [setup, install] = steps(&one);
    assert_eq!(
        (&setup["verdict"], &install["verdict"]),
        (&"hit".into(), &"hit".into())
    );
    assert_eq!(
        install["record"]["layer_id"],
        built.get("install").layer_id.as_str()
    );
    assert_eq!(install["record"]["is_last"], true);
    // busybox's `ls` looks at the files that it lists.
    let counts = &install["record"]["facts"];
    assert_eq!(
        (&counts["contents"], &counts["listings"]),
        (&2.into(), &1.into())
    );
    let text = home.run(&["worker", "explain", one.arg()]).ok().stdout;
    assert!(
        text.contains("install: cached") && text.contains("contents: 2"),
        "{text}"
    );

    // The project's own record is first, though that of the other project is nearer.
    one.write("package.json", "two\n");
    let _ = home.build(&two, &[]);
    one.write("src/b", "b");
    let [_, install] = steps(&one);
    assert_eq!(install["verdict"], "run");
    let nearest = install["nearest"].as_array().unwrap();
    let told: Vec<_> = nearest
        .iter()
        .map(|record| {
            let paths = record["differences"].as_array().unwrap().iter();
            let paths: Vec<_> = paths.map(|one| one["path"].as_str().unwrap()).collect();
            (record["is_last"].as_bool().unwrap(), paths)
        })
        .collect();
    assert_eq!(
        told,
        [(true, vec!["package.json", "src"]), (false, vec!["src"])]
    );
    let text = home.run(&["worker", "explain", one.arg()]).ok().stdout;
    assert!(
        text.contains("install: has to run") && text.contains("package.json: was"),
        "{text}"
    );
    assert_eq!(install["reason"], home.build(&one, &[]).reason());
}

/// A line names the lock files and own files that install made or changed, once.
#[test]
fn an_install_that_writes_to_the_project_says_so_when_it_runs() {
    let home = Home::with_busybox();
    let install = "echo x > package-lock.json; chmod +x run.sh; touch same; cat edit > /dev/null; \
                   mkdir node_modules; echo x > node_modules/yarn.lock; echo x > other";
    let files = [("run.sh", "#!/bin/sh\n"), ("same", "1"), ("edit", "1")];
    let project = project(install, &files);
    let build = || home.run(&["worker", "build", project.arg()]).ok().stderr;
    let line = "install made package-lock.json, changed run.sh; \
                copy them into the project to keep them";
    let told = build();
    assert!(told.contains(line), "{told}");
    let told = build();
    assert!(!told.contains("copy"), "{told}");
    project.write("package-lock.json", "x\n");
    project.write("edit", "2");
    let told = build();
    let line = "install changed run.sh; copy it into the project to keep it";
    assert!(told.contains(line), "{told}");
}
