//! Eight tools at once on one home, killed at any moment.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{Home, LIMIT, Project, Running, busybox_base, files};

const TOOLS: usize = 8;

/// Numbers by a seed: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, count: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % count
    }
}

enum Fate {
    Runs,
    Killed,
    Ended,
}

fn project(number: usize) -> Project {
    let project = Project::scripts(
        "echo set up >/set-up",
        "cat main.txt shared.txt >/installed",
        "cat /set-up /installed main.txt; echo x >>/runs",
    );
    let name = format!("name: box{number}");
    project.edit("iii.worker.yaml", "name: box", &name);
    project.write("main.txt", "main 0\n");
    project.write("shared.txt", &"the same everywhere\n".repeat(10_000));
    project
}

/// Starts something that a user may start at any time.
fn start<'a>(home: &'a Home, project: &Project, number: usize, random: &mut Random) -> Running<'a> {
    // Some runs find all of it there, others build.
    let version = random.below(3);
    project.write("main.txt", &format!("main {version}\n"));
    match random.below(8) {
        0..3 => home.dev(project, &[]),
        3..6 => home.start(&["worker", "build", project.arg()]),
        6 => {
            let image = format!("localhost/base{number}:latest");
            let base = busybox_base().to_str().unwrap();
            home.start(&["image", "import", base, "--as", &image])
        }
        _ => {
            let all = ["--max-size", "1B", "--keep", "0s", "--grace", "0s"];
            home.start(&[&["store", "gc"][..], &all].concat())
        }
    }
}

fn kill_for(time: Duration) {
    let home = Home::with_busybox();
    let projects: Vec<_> = (0..TOOLS).map(project).collect();
    let mut random = Random(u64::from(std::process::id()) | 1 << 40);
    let mut running: Vec<_> = (projects.iter().enumerate())
        .map(|(number, project)| start(&home, project, number, &mut random))
        .collect();
    let begin = Instant::now();
    let (mut kills, mut ends) = (0, 0);
    while begin.elapsed() < time {
        std::thread::sleep(Duration::from_millis(random.below(150)));
        // Some die at once, before the test looks after them.
        let fates: Vec<Fate> = running
            .iter_mut()
            .map(|tool| match tool.is_running() {
                false => Fate::Ended,
                true if random.below(3) == 0 => {
                    tool.signal(Signal::KILL);
                    Fate::Killed
                }
                true => Fate::Runs,
            })
            .collect();
        for ((number, project), fate) in projects.iter().enumerate().zip(fates) {
            if let Fate::Runs = fate {
                continue;
            }
            let ended = running.remove(number).finish(LIMIT);
            if let Fate::Ended = fate {
                // A process that is not killed succeeds, even if the others die.
                ended.ok();
                ends += 1;
            } else {
                kills += 1;
            }
            let next = start(&home, project, number, &mut random);
            running.insert(number, next);
        }
    }
    for mut tool in running {
        tool.signal(Signal::KILL);
        tool.finish(LIMIT);
    }
    home.assert_nothing_left();
    eprintln!("{kills} killed, {ends} ended");
    for (number, project) in projects.iter().enumerate() {
        project.write("main.txt", &format!("the end of {number}\n"));
        let end = format!("the end of {number}");
        home.run(&["worker", "dev", project.arg()]).ok().says(&[
            "set up",
            "the same everywhere",
            &end,
        ]);
    }
    home.run(&["store", "gc", "--keep", "0s", "--grace", "0s"])
        .ok();
    let store = home.state().join("store/v1");
    for name in ["tmp", "trash", "leases", "locks"] {
        let left = files(&store.join(name));
        assert!(left.is_empty(), "{left:?}");
    }
    let build = home.state().join("build");
    assert!(files(&build).is_empty(), "{:?}", files(&build));
}

#[test]
fn eight_tools_are_killed_at_random() {
    kill_for(Duration::from_secs(12));
}

#[test]
#[ignore = "takes minutes"]
fn eight_tools_are_killed_at_random_for_long() {
    kill_for(Duration::from_secs(180));
}
