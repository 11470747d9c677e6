//! The commands that documents quote: each runs, and prints what the document shows.
//!
//! A page is one session. Its blocks of the language `console` run one after the other in a home
//! of their own, whose Node base is busybox, in a directory with the projects `my-project`, `api`,
//! `cron` and `mailer`. In a block, `$ ` begins a command; the lines below it are its output, if
//! the block shows any. They are compared loosely: numbers, ids, units and runs of spaces do not
//! count, nor do empty lines and the one that names the runtime. A line `…` stands for any lines.
//! A line that begins with `^C` is where the reader interrupts the command. Output that begins with
//! `error:` means that the command has to fail.
//!
//! A block below the comment `<!-- not run: REASON -->` is only parsed.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use iii_tidy::markdown::{self, Block};
use tempfile::TempDir;

use crate::harness::{Home, LIMIT, NODE_IMAGE, busybox_base, repository};

/// A page for each test, so that they run beside each other.
macro_rules! pages {
    ($($test:ident: $page:literal,)*) => {
        const PAGES: &[&str] = &[$($page),*];
        $(
            #[test]
            fn $test() {
                run_page($page);
            }
        )*
    };
}

pages! {
    commands: "docs/commands.md",
    images_and_registries: "docs/images-and-registries.md",
    layers_and_caching: "docs/layers-and-caching.md",
    managed_workers: "docs/managed-workers.md",
    manifest: "docs/manifest.md",
    readme: "README.md",
    sandboxes_and_security: "docs/sandboxes-and-security.md",
    start: "docs/start.md",
    store: "docs/store.md",
    troubleshooting: "docs/troubleshooting.md",
}

#[test]
fn every_page_with_commands_is_run() {
    let mut pages = vec!["README.md".to_owned()];
    for entry in fs::read_dir(repository("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(format!("docs/{}", path.file_name().unwrap().display()));
        }
    }
    for page in pages {
        let quoted = blocks(&page)
            .iter()
            .any(|block| block.language == "console");
        assert!(
            !quoted || PAGES.contains(&page.as_str()),
            "{page} is not run"
        );
    }
}

fn blocks(page: &str) -> Vec<Block> {
    markdown::parse(&fs::read_to_string(repository(page)).unwrap()).blocks
}

/// A command of a block, with the output that the block shows.
#[derive(Debug, PartialEq, Eq)]
struct Quoted {
    line: usize,
    command: String,
    output: Vec<String>,
}

fn quoted(block: &Block) -> Vec<Quoted> {
    let mut found: Vec<Quoted> = Vec::new();
    for (index, line) in block.lines.iter().enumerate() {
        let continued = found
            .last_mut()
            .filter(|last| last.output.is_empty() && last.command.ends_with('\\'));
        if let Some(last) = continued {
            last.command.push('\n');
            last.command.push_str(line);
        } else if let Some(command) = line.strip_prefix("$ ") {
            found.push(Quoted {
                line: block.line + 1 + index,
                command: command.to_owned(),
                output: Vec::new(),
            });
        } else if let Some(last) = found.last_mut() {
            last.output.push(line.clone());
        } else {
            panic!("a console block begins with `$ `: {block:?}");
        }
    }
    found
}

fn run_page(page: &str) {
    let home = shell();
    for block in blocks(page)
        .iter()
        .filter(|block| block.language == "console")
    {
        let directive = block.directive.as_deref().unwrap_or_default();
        for quoted in quoted(block) {
            let place = format!("{page}:{}", quoted.line);
            if directive.starts_with("not run: ") {
                parse(&home, &place, &quoted.command);
            } else {
                run(&home, &place, &quoted);
            }
        }
    }
    home.start(&[&script(
        "for name in api cron mailer; do iii worker stop $name; done",
    )])
    .finish(LIMIT);
    home.assert_nothing_left();
}

/// A home in which a shell runs commands, with the projects that the documents speak of.
fn shell() -> Home {
    let dir = TempDir::with_prefix("home-").unwrap();
    for name in ["my-project", "api", "cron", "mailer"] {
        let project = dir.path().join(name);
        fs::create_dir_all(project.join("src")).unwrap();
        let write = |name: &str, text: &str| fs::write(project.join(name), text).unwrap();
        write("iii.worker.yaml", &manifest_of(name));
        write(
            "package.json",
            "{ \"dependencies\": { \"left-pad\": \"1.3.0\" } }\n",
        );
        write("src/index.js", "console.log('hello')\n");
    }
    let home = Home::through(dir, vec!["/bin/sh".into(), "-c".into()]);
    let import = format!(
        "iii image import {} --as {NODE_IMAGE}",
        busybox_base().display()
    );
    home.start(&[&script(&import)]).finish(LIMIT).ok();
    home
}

fn manifest_of(name: &str) -> String {
    format!(
        "name: {name}\n\
         runtime:\n  kind: javascript\n\
         scripts:\n\
         \x20 setup: 'true'\n\
         \x20 install: |\n    mkdir -p node_modules && cp package.json node_modules/.from\n    \
         echo added 1 package\n\
         \x20 start: echo hello from {name}; exec sleep 1000\n"
    )
}

/// `command` as the reader's shell would run it, with both streams in one.
fn script(command: &str) -> String {
    let bin = Path::new(env!("CARGO_BIN_EXE_iii")).parent().unwrap();
    format!("PATH={}:$PATH\nexec 2>&1\n{command}", bin.display())
}

fn run(home: &Home, place: &str, quoted: &Quoted) {
    let loose = |lines: &[String]| -> Vec<String> {
        lines
            .iter()
            .map(|line| loosely(line, home.path()))
            .filter(|line| !line.is_empty() && !line.starts_with("runtime "))
            .collect()
    };
    let is_interrupted = quoted.output.iter().any(|line| line.starts_with("^C"));
    let shown: Vec<String> = quoted
        .output
        .iter()
        .map(|line| line.trim_start_matches("^C").to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    let ended = if is_interrupted {
        // The shell makes way, so that the signal and the exit code are the command's.
        let mut running = home.start(&[&script(&format!("exec {}", quoted.command))]);
        let before = quoted
            .output
            .iter()
            .take_while(|line| !line.starts_with("^C"));
        let mut missing = loose(&before.cloned().collect::<Vec<_>>());
        missing.retain(|line| line != "…");
        while !missing.is_empty() {
            let line = loosely(&running.wait_for(""), home.path());
            missing.retain(|wanted| *wanted != line);
        }
        running.ctrl_c();
        running.finish(LIMIT)
    } else {
        home.start(&[&script(&quoted.command)]).finish(LIMIT)
    };
    let fails = shown.iter().any(|line| line.starts_with("error:"));
    assert!(
        (ended.status.code() == Some(0)) != fails,
        "{place}: `{}` ended with {:?}\n{}",
        quoted.command,
        ended.status.code(),
        ended.stdout
    );
    if shown.is_empty() {
        return;
    }
    let printed: Vec<String> = ended.stdout.lines().map(str::to_owned).collect();
    let (pattern, lines) = (loose(&shown), loose(&printed));
    // The lines of a worker and those of the tool have no order.
    let is_as_shown = if is_interrupted {
        let all = pattern
            .iter()
            .all(|line| line == "…" || lines.contains(line));
        all && (pattern.contains(&"…".to_owned()) || pattern.len() == lines.len())
    } else {
        matches(&pattern, &lines)
    };
    assert!(
        is_as_shown,
        "{place}: `{}` printed\n{}\nand the page shows\n{}",
        quoted.command,
        ended.stdout,
        shown.join("\n")
    );
}

/// Whether `lines` are those of `pattern`, in which `…` stands for any lines.
fn matches(pattern: &[String], lines: &[String]) -> bool {
    match pattern {
        [] => lines.is_empty(),
        [any, rest @ ..] if any == "…" => {
            (0..=lines.len()).any(|skipped| matches(rest, &lines[skipped..]))
        }
        [first, rest @ ..] => lines.first() == Some(first) && matches(rest, &lines[1..]),
    }
}

/// `line` without what differs from run to run: each number is 0, each unit of time `t`, each unit
/// of size `B`, each counted noun a singular, each id `<id>`, and spaces are single.
fn loosely(line: &str, home: &Path) -> String {
    let line = line.replace(home.to_str().unwrap(), "/home/me");
    let mut words: Vec<String> = line.split_whitespace().map(loose_word).collect();
    for index in 1..words.len() {
        if words[index - 1].ends_with('0') {
            let unit = words[index].trim_start_matches(['K', 'M', 'G', 'i']);
            let unit = unit.replace("s,", ",");
            words[index] = unit.trim_end_matches('s').into();
        }
    }
    words.join(" ")
}

fn loose_word(word: &str) -> String {
    let is_id = |part: &str| {
        part.len() >= 6
            && part
                .chars()
                .all(|char| char.is_ascii_digit() || ('a'..='f').contains(&char))
            && part.chars().any(|char| char.is_ascii_digit())
    };
    let is_part = |char: char| char.is_ascii_alphanumeric();
    let mut loose = String::new();
    let mut rest = word;
    while let Some(char) = rest.chars().next() {
        let end = rest.find(|char| !is_part(char)).unwrap_or(rest.len());
        let (part, behind) = if end == 0 {
            rest.split_at(char.len_utf8())
        } else {
            rest.split_at(end)
        };
        rest = behind;
        if is_id(part) {
            loose.push_str("<id>");
            continue;
        }
        let behind = part.trim_start_matches(|char: char| char.is_ascii_digit());
        if behind.len() == part.len() {
            loose.push_str(part);
            continue;
        }
        // The digits behind a point are of the same number.
        if loose.ends_with("0.") {
            loose.pop();
        } else {
            loose.push('0');
        }
        match behind {
            "ms" | "s" | "m" | "h" => loose.push('t'),
            // As in the middle of a time.
            behind => loose.extend(behind.chars().filter(|char| !char.is_ascii_digit())),
        }
    }
    loose
}

/// Checks that the program parses each `iii` of a command that is not run, as far as its `--help`.
fn parse(home: &Home, place: &str, command: &str) {
    let command = command.replace("\\\n", " ");
    let parts = command.split(['|', '&', ';']).map(str::trim);
    for part in parts.filter(|part| part.starts_with("iii ") || part.starts_with("iii-worker ")) {
        let end = [" -- ", " #", " >", " <"]
            .iter()
            .filter_map(|end| part.find(end))
            .min();
        let script = script(&format!("{} --help", &part[..end.unwrap_or(part.len())]));
        let ended = home.start(&[&script]).finish(LIMIT);
        assert_eq!(
            ended.status.code(),
            Some(0),
            "{place}: `{part}`\n{}",
            ended.stdout
        );
    }
}

/// The help of every command, as `docs/reference.md` has it. `III_UPDATE_DOCS=1` writes the page.
#[test]
fn reference_is_current() {
    let home = shell();
    let mut page = String::from(
        "# Reference of commands\n\n\
         The help of each command, printed by the program. [commands.md](commands.md) has examples\n\
         that are explained. `iii-worker …` takes the commands of `iii worker …`.\n\n\
         <!-- Written by III_UPDATE_DOCS=1 cargo test --test e2e reference. -->\n",
    );
    let mut commands = vec!["iii".to_owned()];
    while let Some(command) = commands.pop() {
        let ended = home
            .start(&[&script(&format!("COLUMNS=90 {command} --help"))])
            .finish(LIMIT);
        let help = ended.ok().stdout;
        // Writing to a string cannot fail.
        let _ = write!(
            page,
            "\n## {command}\n\n```text\n{}\n```\n",
            help.trim_end()
        );
        let mut subcommands = subcommands(&help);
        subcommands.reverse();
        commands.extend(subcommands.iter().map(|name| format!("{command} {name}")));
    }
    let path = repository("docs/reference.md");
    if std::env::var_os("III_UPDATE_DOCS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let current = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        current == page,
        "docs/reference.md is not current; III_UPDATE_DOCS=1 cargo test --test e2e reference"
    );
}

/// The names below `Commands:` of a help text.
fn subcommands(help: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = lines
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next());
    names
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_command_has_an_example() {
    let reference = fs::read_to_string(repository("docs/reference.md")).unwrap();
    let examples: Vec<String> = blocks("docs/commands.md")
        .iter()
        .filter(|block| block.language == "console")
        .flat_map(quoted)
        .map(|quoted| quoted.command)
        .collect();
    let names = reference
        .lines()
        .filter_map(|line| line.strip_prefix("## "));
    let names: Vec<&str> = names.collect();
    let is_leaf = |name: &&&str| {
        !names
            .iter()
            .any(|other| other.starts_with(&format!("{name} ")))
    };
    let missing: Vec<&&str> = names
        .iter()
        .filter(is_leaf)
        .filter(|name| !examples.iter().any(|example| example.contains(**name)))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/commands.md has no example of {missing:?}"
    );
}

#[test]
fn output_is_compared_loosely() {
    let home = Path::new("/tmp/home-x");
    for (line, expected) in [
        (
            "  ✓ setup    built (79ms, 0 B new)",
            "✓ setup built (0t, 0 B new)",
        ),
        (
            "install  built (6.8s, 40.8 MiB new)",
            "install built (0t, 0 B new)",
        ),
        ("67104b40fc  project    205 B   now", "<id> project 0 B now"),
        ("in /tmp/home-x/.iii", "in /home/me/.iii"),
        ("my-project 1.3.0", "my-project 0"),
        ("2 layers, 1 ref", "0 layer, 0 ref"),
        ("at 2026-11-29T22:44:40Z", "at 0-0-0T:0:0Z"),
    ] {
        assert_eq!(loosely(line, home), expected);
    }
    let lines = |text: &str| -> Vec<String> { text.lines().map(str::to_owned).collect() };
    for (pattern, printed, expected) in [
        ("a\nb", "a\nb", true),
        ("a\n…\nd", "a\nb\nc\nd", true),
        ("a\n…", "a", true),
        ("a", "a\nb", false),
        ("…\nb", "a\nc", false),
    ] {
        assert_eq!(
            matches(&lines(pattern), &lines(printed)),
            expected,
            "{pattern:?}"
        );
    }
}
