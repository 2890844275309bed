//! What the `table` guest prints, held against its model.

use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use snapstore_guests::{TableModel, TableStep};

/// The good steps in the output of a `table` guest. They must follow each other
/// and be those of the model. Output may begin and end within a line.
///
/// # Errors
/// What else was printed.
pub fn steps(output: &str) -> Result<Vec<u32>> {
    let mut steps: Vec<u32> = Vec::new();
    let Some((whole, _)) = output.rsplit_once('\n') else {
        return Ok(steps);
    };
    for (number, line) in whole.split('\n').enumerate() {
        let Some(step) = TableStep::parse(line) else {
            let banner = ["table guest ", "pong", "cpu ", "got "];
            let known = banner.iter().any(|start| line.starts_with(start)) || number == 0;
            ensure!(known && !line.contains("BAD"), "the guest printed {line:?}");
            continue;
        };
        if let Some(last) = steps.last() {
            ensure!(step.number == last + 1, "{line:?} came after step {last}");
        }
        let expected = expected(step.number)?;
        ensure!(step == expected, "{line:?} should be {expected}");
        steps.push(step.number);
    }
    Ok(steps)
}

/// These steps lie in what was expected.
///
/// # Errors
/// If they do not.
pub fn assert_within(step: u32, range: RangeInclusive<u32>) -> Result<()> {
    ensure!(range.contains(&step), "step {step} is not in {range:?}");
    Ok(())
}

/// What the model prints at a step, from 1.
fn expected(step: u32) -> Result<TableStep> {
    static MODEL: Mutex<Option<(TableModel, Vec<TableStep>)>> = Mutex::new(None);
    let mut model = MODEL.lock().unwrap_or_else(PoisonError::into_inner);
    let (model, known) = model.get_or_insert_with(|| (TableModel::new(), Vec::new()));
    let index = usize::try_from(step.checked_sub(1).context("there is no step 0")?)?;
    ensure!(index < 100_000, "no test runs to step {step}");
    while known.len() <= index {
        known.extend(model.next());
    }
    Ok(known[index])
}
