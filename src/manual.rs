//! `completions` and `man`, made from the definitions that parse the commands.

use std::path::Path;
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::{Completions, Manual, ShellKind};
use super::{CliError, print};
use crate::output::Ui;

/// Prints the script by which a shell completes the commands of the program `P`.
pub fn completions<P: CommandFactory>(args: &Completions) -> Result<ExitCode, CliError> {
    let shell = match args.shell {
        ShellKind::Bash => Shell::Bash,
        ShellKind::Zsh => Shell::Zsh,
        ShellKind::Fish => Shell::Fish,
    };
    let mut command = P::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the page of a command of the program `P`, or writes those of all into a directory.
pub fn manual<P: CommandFactory>(args: &Manual, ui: &Ui) -> Result<ExitCode, CliError> {
    let mut program = P::command().disable_help_subcommand(true);
    program.build();
    if let Some(dir) = &args.out {
        let mut written = 0;
        write_pages(&program, dir, &mut written)?;
        ui.ok(format_args!("{written} pages in {}", dir.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let mut command = &program;
    for name in &args.command {
        let found = command.find_subcommand(name);
        command = found.ok_or_else(|| CliError::NoCommand { name: name.clone() })?;
    }
    print(&page(command)?.1)?;
    Ok(ExitCode::SUCCESS)
}

fn write_pages(command: &Command, dir: &Path, written: &mut usize) -> Result<(), CliError> {
    let cannot = |source| CliError::Pages {
        dir: dir.to_owned(),
        source,
    };
    std::fs::create_dir_all(dir).map_err(cannot)?;
    let (name, text) = page(command)?;
    std::fs::write(dir.join(name), text).map_err(cannot)?;
    *written += 1;
    let mut shown = command.get_subcommands().filter(|one| !one.is_hide_set());
    shown.try_for_each(|one| write_pages(one, dir, written))
}

/// The page of a command, and the name of its file.
fn page(command: &Command) -> Result<(String, String), CliError> {
    const EXTRA: &str = ".SH EXTRA\n";
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render(&mut page).map_err(CliError::Output)?;
    let mut page = String::from_utf8_lossy(&page).into_owned();
    // The text after the help is examples, with lines and columns of their own.
    if let Some(start) = page.find(EXTRA) {
        let end = page[start + EXTRA.len()..].find(".SH ");
        let end = end.map_or(page.len(), |end| start + EXTRA.len() + end);
        page.insert_str(end, ".fi\n");
        page.replace_range(start..start + EXTRA.len(), ".SH EXAMPLES\n.nf\n");
    }
    Ok((man.get_filename(), page))
}

#[cfg(test)]
mod tests {
    use std::process::{Command as Process, Stdio};

    use super::super::args::{Iii, IiiWorker};
    use super::*;

    fn all<P: CommandFactory>() -> Vec<(String, String)> {
        let dir = tempfile::tempdir().unwrap();
        let mut program = P::command().disable_help_subcommand(true);
        program.build();
        write_pages(&program, dir.path(), &mut 0).unwrap();
        let entries = std::fs::read_dir(dir.path()).unwrap();
        let mut pages: Vec<_> = entries
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, std::fs::read_to_string(path).unwrap())
            })
            .collect();
        pages.sort();
        pages
    }

    #[test]
    fn every_command_has_a_page_without_faults() {
        let (long, short) = (all::<Iii>(), all::<IiiWorker>());
        for name in [
            "iii.1",
            "iii-worker.1",
            "iii-worker-start.1",
            "iii-store-gc.1",
        ] {
            assert!(long.iter().any(|(own, _)| own == name), "{name}");
        }
        for name in ["iii-worker.1", "iii-worker-start.1"] {
            assert!(short.iter().any(|(own, _)| own == name), "{name}");
        }
        let (_, start) = &long
            .iter()
            .find(|(own, _)| own == "iii-worker-start.1")
            .unwrap();
        assert!(start.contains(".SH EXAMPLES\n.nf\n"), "{start}");
        if Process::new("man").arg("-V").output().is_err() {
            eprintln!("SKIPPED: rendering of man pages: man is missing");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for (name, page) in long {
            let path = dir.path().join(&name);
            std::fs::write(&path, page).unwrap();
            let rendered = Process::new("man")
                .args(["--warnings", "-l", "-E", "UTF-8"])
                .arg(&path)
                .env("MANWIDTH", "120")
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let faults = String::from_utf8_lossy(&rendered.stderr);
            assert!(
                rendered.status.success() && faults.is_empty(),
                "{name}: {faults}"
            );
            assert!(
                String::from_utf8_lossy(&rendered.stdout).contains("NAME"),
                "{name}"
            );
        }
    }

    /// The words that bash offers after these.
    fn offered<P: CommandFactory>(name: &str, words: &[&str]) -> Vec<String> {
        let mut script = Vec::new();
        clap_complete::generate(Shell::Bash, &mut P::command(), name, &mut script);
        let last = words.len();
        let script = format!(
            "set -eu\n{}\nCOMP_WORDS=({name} {}); COMP_CWORD={last}; COMPREPLY=()\n\
             f=$(complete -p {name} | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n\
             set +eu; $f {name} {:?} {:?}; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            String::from_utf8(script).unwrap(),
            words.join(" "),
            words.last().unwrap(),
            words.get(words.len().wrapping_sub(2)).unwrap_or(&name),
        );
        let ended = Process::new("bash")
            .args(["--norc", "--noprofile", "-c", &script])
            .output()
            .unwrap();
        assert!(ended.stderr.is_empty(), "{ended:?}");
        let text = String::from_utf8(ended.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn bash_completes_commands_of_both_programs() {
        if Process::new("bash").arg("--version").output().is_err() {
            eprintln!("SKIPPED: completions of bash: bash is missing");
            return;
        }
        let commands = ["start", "stop", "status"];
        let mut found = offered::<Iii>("iii", &["worker", "st"]);
        found.sort();
        let mut expected = commands.map(str::to_owned).to_vec();
        expected.sort();
        assert_eq!(found, expected);
        let mut found = offered::<IiiWorker>("iii-worker", &["st"]);
        found.sort();
        assert_eq!(found, expected);
        assert!(
            offered::<Iii>("iii", &["worker", "rollback", "--no"])
                .contains(&"--no-wait".to_owned())
        );
    }

    #[test]
    fn zsh_and_fish_get_scripts_that_name_the_commands() {
        for shell in [Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Iii::command(), "iii", &mut script);
            let script = String::from_utf8(script).unwrap();
            for name in ["snapshot", "rollback", "worker", "gc"] {
                assert!(script.contains(name), "{shell}: {name}");
            }
        }
    }
}
