//! The uppers of workers in `iii store verify`.

use iii_engine::uppers::CheckedUpper;
use iii_overlay::upper::{UpperError, UpperReport};
use iii_store::{path_json, with_causes};
use serde_json::{Value, json};

use super::verify::Verdict;
use crate::output::{Ui, human_bytes, human_count, human_counted};

/// Says of each upper whether it is healthy, and what can be done if it is not.
pub fn say(uppers: &[CheckedUpper], repair: bool, ui: &Ui) {
    for upper in uppers {
        let dir = upper.dir.display();
        match (&upper.found, state(upper)) {
            (Ok(report), _) => ui.ok(format_args!("{dir}: healthy, {}", holds(report))),
            (Err(error), Verdict::Damaged) => {
                ui.error(format_args!("{dir}: damaged: {}", with_causes(error)));
            }
            (Err(error), _) => {
                ui.warn(format_args!("{dir}: not checked: {}", with_causes(error)));
            }
        }
    }
    if verdict(uppers) != Verdict::Damaged {
        return;
    }
    if repair {
        ui.note("a repair leaves uppers as they are");
    }
    ui.note("copy a damaged upper away, to look for files below its `data`; then `iii worker dev --fresh` or `iii worker clear NAME` drops it and keeps the layers");
}

/// The worst of them.
pub fn verdict(uppers: &[CheckedUpper]) -> Verdict {
    let worst = uppers.iter().map(state).max();
    worst.unwrap_or(Verdict::Healthy)
}

/// One object for each upper.
pub fn as_json(uppers: &[CheckedUpper]) -> Vec<Value> {
    uppers.iter().map(row).collect()
}

fn state(upper: &CheckedUpper) -> Verdict {
    match &upper.found {
        Ok(_) => Verdict::Healthy,
        Err(
            UpperError::Damaged { .. } | UpperError::NotAnUpper(_) | UpperError::TooLarge { .. },
        ) => Verdict::Damaged,
        // An error of the machine, or a version that this program does not know: it may be whole.
        Err(_) => Verdict::Unchecked,
    }
}

fn holds(report: &UpperReport) -> String {
    let mut text = format!(
        "{}, {} with contents of their own",
        human_counted(report.inodes, "inode"),
        human_counted(report.files, "file")
    );
    if report.missing > 0 {
        text.push_str(", the contents of ");
        text.push_str(&human_count(report.missing));
        text.push_str(" are missing");
    }
    if report.torn > 0 {
        text.push_str(", ");
        text.push_str(&human_bytes(report.torn));
        text.push_str(" of changes that were not made durable");
    }
    text
}

fn row(upper: &CheckedUpper) -> Value {
    let state = match state(upper) {
        Verdict::Healthy => "healthy",
        Verdict::Unchecked => "unchecked",
        Verdict::Damaged => "damaged",
    };
    let mut row = json!({ "path": path_json::text(&upper.dir), "state": state });
    match &upper.found {
        Ok(report) => {
            row["inodes"] = report.inodes.into();
            row["files"] = report.files.into();
            row["missing"] = report.missing.into();
            row["torn"] = report.torn.into();
        }
        Err(error) => {
            if let UpperError::Damaged { offset, .. } = error {
                row["offset"] = (*offset).into();
            }
            row["error"] = with_causes(error).into();
        }
    }
    row
}
