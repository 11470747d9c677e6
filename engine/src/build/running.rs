//! Steps that run, for those who see their inputs change meanwhile.
//!
//! A step whose inputs have changed makes a layer that is outdated by the time it exists. So the
//! watcher of a project asks the steps to look again after a change: a step that has seen
//! something which is different now is ended. The observations of a step in a microVM are not known
//! before its end: there any change of the project's tree counts, a bounded number of times, so
//! that a project that never rests is built all the same.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use iii_overlay::Overlay;
use iii_sandbox::Controller;
use iii_store::facts::first_mismatch;
use iii_store::{Layer, Store};
use rustix::process::Signal;

use super::{BuildError, project_root, take_snapshot};
use crate::project::Project;

/// How often in a row steps are cancelled without known observations.
const MAX_BLIND: u32 = 2;

/// The steps that run.
#[derive(Default)]
pub struct RunningSteps {
    steps: Mutex<Steps>,
    /// How many were cancelled since the last one that ended by itself, without known
    /// observations.
    blind: AtomicU32,
}

#[derive(Default)]
struct Steps {
    steps: BTreeMap<u64, Arc<RunningStep>>,
    next: u64,
}

/// One step that runs.
pub(super) struct RunningStep {
    pub store: Store,
    pub project: Project,
    /// The project as the step sees it.
    pub seen: Arc<Layer>,
    /// The step's filesystem, if this process serves it.
    pub overlay: Option<Arc<Overlay>>,
    pub controller: Controller,
    /// The path for which the step was cancelled.
    pub cancelled: OnceLock<Vec<u8>>,
}

impl RunningSteps {
    /// Calls `wait`, and meanwhile has `step` look again when it is asked to. Returns the result,
    /// and the path for which the step was cancelled.
    pub(super) fn attend<R>(
        &self,
        step: RunningStep,
        wait: impl FnOnce() -> R,
    ) -> (R, Option<Vec<u8>>) {
        let step = Arc::new(step);
        let number = {
            let mut steps = self.lock();
            steps.next += 1;
            let number = steps.next;
            steps.steps.insert(number, Arc::clone(&step));
            number
        };
        let result = wait();
        self.lock().steps.remove(&number);
        let cancelled = step.cancelled.get().cloned();
        if cancelled.is_none() {
            self.blind.store(0, Ordering::Relaxed);
        }
        (result, cancelled)
    }

    /// The project of some of the steps has changed: ends those that have seen something else.
    pub fn look_again(&self) {
        let steps: Vec<_> = self.lock().steps.values().cloned().collect();
        for step in steps {
            // A failed look is repeated when the step has ended.
            if let Ok(Some(path)) = step.mismatch(&self.blind)
                && step.cancelled.set(path).is_ok()
            {
                // It can only fail when the sandbox is gone, as intended.
                let _ = step.controller.stop(Signal::KILL, Duration::ZERO);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RunningStep {
    /// A path that the step has seen and that is different now.
    fn mismatch(&self, blind: &AtomicU32) -> Result<Option<Vec<u8>>, BuildError> {
        let lease = self.store.lease("look at a project")?;
        let (now, _) = take_snapshot(&self.store, &lease, &self.project, &|| ())?;
        if now.layer.tree_id() == self.seen.tree_id() {
            return Ok(None);
        }
        let Some(overlay) = &self.overlay else {
            let allowed = blind.fetch_add(1, Ordering::Relaxed) < MAX_BLIND;
            return Ok(allowed.then(Vec::new));
        };
        let facts = overlay.facts();
        let mismatch = first_mismatch(&facts, project_root(&now.layer));
        Ok(mismatch.map(|fact| fact.path.clone()))
    }
}
