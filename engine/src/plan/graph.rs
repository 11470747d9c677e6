//! In which order the layers of many workers are made: pure.
//!
//! A task is named by its product, so that workers which need the same thing wait for one task. The
//! product of a step is known only when the layers below it are there; so each worker asks for one
//! task after the other, and the graph grows as it is worked off.
//!
//! **Invariant:** of the steps with one key, one runs at a time. Those of other projects come after
//! it and find its record, if its facts hold for them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;

use iii_store::{KeyId, TreeId};

use crate::plan::Kind;

/// A step, by its product: its recipe, and the project that it looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StepId {
    /// Setup or install.
    pub kind: Kind,
    /// Its recipe.
    pub key: KeyId,
    /// The project that it looks at.
    pub project: TreeId,
}

/// A task, by its product.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// A base image, by its name.
    Base(String),
    /// The layer of the project in a directory.
    Project(PathBuf),
    /// The layer of a step.
    Step(StepId),
}

impl Task {
    /// The layer that it makes.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Base(_) => Kind::Base,
            Self::Project(_) => Kind::Project,
            Self::Step(step) => step.kind,
        }
    }

    fn key(&self) -> Option<KeyId> {
        match self {
            Self::Step(step) => Some(step.key),
            Self::Base(_) | Self::Project(_) => None,
        }
    }
}

/// The tasks that workers, which are numbers here, wait for, each with what it takes to do it.
#[derive(Debug)]
pub struct Graph<W> {
    /// The workers that wait for each task.
    open: BTreeMap<Task, Vec<usize>>,
    /// Tasks that have not begun, the oldest first.
    queue: VecDeque<(Task, W)>,
    /// Keys of the steps that have begun.
    busy: BTreeSet<KeyId>,
}

impl<W> Default for Graph<W> {
    fn default() -> Self {
        Self {
            open: BTreeMap::new(),
            queue: VecDeque::new(),
            busy: BTreeSet::new(),
        }
    }
}

impl<W> Graph<W> {
    /// Makes `worker` wait for `task`, which is done by `work` unless an earlier call brought it.
    pub fn want(&mut self, worker: usize, task: Task, work: W) {
        if let Some(waiting) = self.open.get_mut(&task) {
            waiting.push(worker);
        } else {
            self.open.insert(task.clone(), vec![worker]);
            self.queue.push_back((task, work));
        }
    }

    /// The next task that may begin.
    pub fn take(&mut self) -> Option<(Task, W)> {
        let busy = &self.busy;
        let is_free = |task: &Task| task.key().is_none_or(|key| !busy.contains(&key));
        let at = self.queue.iter().position(|(task, _)| is_free(task))?;
        let (task, work) = self.queue.remove(at)?;
        self.busy.extend(task.key());
        Some((task, work))
    }

    /// Ends a task that was taken. Returns the workers that waited for it, in the order in which
    /// they asked for it.
    pub fn finish(&mut self, task: &Task) -> Vec<usize> {
        if let Some(key) = task.key() {
            self.busy.remove(&key);
        }
        self.open.remove(task).unwrap_or_default()
    }

    /// Whether no worker waits.
    pub fn is_over(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker's tasks, one letter each: the base, the project, and steps by key.
    fn tasks(worker: &str) -> Vec<Task> {
        let step = |kind, key: u8, project: u8| {
            Task::Step(StepId {
                kind,
                key: KeyId::from_bytes([key; 32]),
                project: TreeId::from_bytes([project; 32]),
            })
        };
        let letters: Vec<u8> = worker.bytes().collect();
        let [base, project, setup, install] = letters[..] else {
            panic!("{worker} has four letters");
        };
        vec![
            Task::Base((base as char).to_string()),
            Task::Project((project as char).to_string().into()),
            step(Kind::Setup, setup, project),
            step(Kind::Install, install, project),
        ]
    }

    fn letter(task: &Task) -> String {
        match task {
            Task::Base(name) => name.clone(),
            Task::Project(path) => path.display().to_string(),
            Task::Step(step) => [step.key.as_bytes()[0], step.project.as_bytes()[0]]
                .map(char::from)
                .iter()
                .collect(),
        }
    }

    /// Runs `threads` tasks at a time, each taking one round; a failing one fails its waiters.
    /// Returns the tasks begun in each round, and the workers that have everything.
    fn run(workers: &[&str], threads: usize, failing: &str) -> (Vec<String>, Vec<usize>) {
        let mut left: Vec<VecDeque<Task>> = workers.iter().map(|w| tasks(w).into()).collect();
        let mut graph = Graph::default();
        let (mut done, mut failed) = (BTreeSet::new(), BTreeSet::new());
        let advance = |graph: &mut Graph<usize>,
                       done: &BTreeSet<Task>,
                       left: &mut Vec<VecDeque<Task>>,
                       worker: usize| {
            while left[worker].front().is_some_and(|task| done.contains(task)) {
                left[worker].pop_front();
            }
            if let Some(task) = left[worker].front() {
                graph.want(worker, task.clone(), worker);
            }
        };
        for worker in 0..workers.len() {
            advance(&mut graph, &done, &mut left, worker);
        }
        let mut rounds = Vec::new();
        while !graph.is_over() {
            let taken: Vec<_> = std::iter::from_fn(|| graph.take()).take(threads).collect();
            assert!(!taken.is_empty(), "stuck: {graph:?}");
            let letters: Vec<_> = taken.iter().map(|(task, _)| letter(task)).collect();
            for (task, worker) in &taken {
                let waited = graph.finish(task);
                assert_eq!(waited.first(), Some(worker));
                done.insert(task.clone());
                for worker in waited {
                    left[worker].pop_front();
                    if letter(task) == failing {
                        failed.insert(worker);
                        left[worker].clear();
                    } else {
                        advance(&mut graph, &done, &mut left, worker);
                    }
                }
            }
            rounds.push(letters.join(" "));
        }
        let whole = (0..workers.len()).filter(|worker| !failed.contains(worker));
        (rounds, whole.collect())
    }

    #[test]
    fn equal_tasks_are_done_once_and_in_order() {
        for (workers, threads, rounds) in [
            (&[][..], 2, &[][..]),
            (&["bpsi"], 2, &["b", "p", "sp", "ip"]),
            // All the same: one worker's work.
            (&["bpsi", "bpsi", "bpsi"], 4, &["b", "p", "sp", "ip"]),
            // Nothing the same.
            (&["bpsi", "cqtj"], 2, &["b c", "p q", "sp tq", "ip jq"]),
            // Two projects with the same recipes: each asks, one after the other.
            (&["bpsi", "bqsi"], 4, &["b", "p q", "sp", "sq ip", "iq"]),
            // No more at once than there are threads.
            (
                &["bpsi", "cqtj", "drku"],
                2,
                &["b c", "d p", "q r", "sp tq", "kr ip", "jq ur"],
            ),
        ] {
            let (begun, whole) = run(workers, threads, "");
            assert_eq!(begun, rounds, "{workers:?}");
            assert_eq!(whole.len(), workers.len());
        }
    }

    #[test]
    fn a_failure_fails_only_those_who_wait_for_it() {
        let workers = ["bpsi", "bpsj", "bqti", "cruk"];
        for (failing, whole) in [
            ("", &[0, 1, 2, 3][..]),
            ("b", &[3]),
            ("p", &[2, 3]),
            ("sp", &[2, 3]),
            ("ip", &[1, 2, 3]),
            ("tq", &[0, 1, 3]),
        ] {
            assert_eq!(run(&workers, 2, failing).1, whole, "{failing}");
        }
    }
}
