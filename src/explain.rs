//! `iii worker explain`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use iii_engine::build::explain::{
    self, ExplainedRecord, ExplainedStep, Explanation, FactCounts, Verdict,
};
use iii_engine::home::Home;
use iii_engine::project::Project;
use iii_engine::worker::error::RunError;
use iii_sandbox::tail::inert;

use super::worker::caches;
use super::{CliError, args, print, print_json};
use crate::output::{human_counted, human_duration, human_time};

/// Most differing facts of one record that are printed for people.
const MAX_PRINTED: usize = 10;

pub fn explain(home: &Home, args: &args::Explain) -> Result<ExitCode, CliError> {
    let project = if args.worker.starts_with(['.', '/', '~']) {
        Project::open(args.worker.as_ref()).map_err(RunError::from)?
    } else {
        explain::project_of(home, &args.worker.parse().map_err(RunError::from)?)?
    };
    let caches = caches(Vec::new(), None)?;
    let explanation = explain::explain(home, &project, args.base.as_deref(), &caches)?;
    if args.json {
        print_json(&explanation)?;
    } else {
        print(&text(&explanation))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// An explanation for people.
fn text(explanation: &Explanation) -> String {
    if explanation.steps.is_empty() {
        return "the project has neither a setup nor an install script\n".into();
    }
    explanation.steps.iter().map(step).collect()
}

// Writing to a string cannot fail.
fn step(step: &ExplainedStep) -> String {
    let reason = inert(step.reason.as_deref().unwrap_or_default());
    let mut text = match step.verdict {
        Verdict::Hit => format!("{}: cached\n", step.kind),
        Verdict::Run => format!("{}: has to run ({reason})\n", step.kind),
        Verdict::Unknown => format!("{}: unknown; {reason}\n", step.kind),
    };
    if let Some(found) = &step.record {
        let _ = writeln!(text, "  {}", record(found));
        let _ = writeln!(text, "    stands on {}", counts(&found.facts));
    }
    for near in &step.nearest {
        let _ = writeln!(text, "  {}", record(near));
        let _ = writeln!(
            text,
            "    stands on {}; {} now",
            counts(&near.facts),
            match near.differing {
                1 => "1 differs".to_owned(),
                differing => format!("{differing} differ"),
            }
        );
        for one in near.differences.iter().take(MAX_PRINTED) {
            let path = if one.path.is_empty() {
                "the project"
            } else {
                &one.path
            };
            let _ = writeln!(
                text,
                "    {}: was {}, is {}",
                inert(path),
                one.seen,
                one.now
            );
        }
        let more = near.differing.saturating_sub(MAX_PRINTED);
        if more > 0 {
            let _ = writeln!(text, "    and {more} more");
        }
    }
    text
}

fn record(record: &ExplainedRecord) -> String {
    let owner = if record.is_last {
        "last record of this project"
    } else {
        "record"
    };
    let mut text = format!("{owner}: layer {}", record.layer_id.short());
    if !record.is_stored {
        text.push_str(" (not in the store)");
    }
    if let Some(created) = record.created {
        let _ = write!(text, ", built {}", human_time(created));
    }
    if let Some(Ok(took)) = record.seconds.map(Duration::try_from_secs_f64) {
        let _ = write!(text, " in {}", human_duration(took));
    }
    if let Some(reason) = &record.reason {
        let _ = write!(text, " ({})", inert(reason));
    }
    if let Some(cache) = &record.cache {
        let _ = write!(text, ", from {}", inert(cache));
    }
    text
}

/// Numbers of facts: `3 facts (contents: 2, absent names: 1)`.
fn counts(facts: &FactCounts) -> String {
    let kinds = [
        (facts.contents, "contents"),
        (facts.listings, "listings"),
        (facts.types, "types"),
        (facts.targets, "link targets"),
        (facts.trees, "whole directories"),
        (facts.absent, "absent names"),
    ];
    let total: usize = kinds.iter().map(|(count, _)| count).sum();
    let named: Vec<String> = kinds
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, kind)| format!("{kind}: {count}"))
        .collect();
    let mut text = human_counted(total as u64, "fact");
    if !named.is_empty() {
        let _ = write!(text, " ({})", named.join(", "));
    }
    text
}
