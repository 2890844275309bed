//! `snapstore doctor`

use std::process::ExitCode;

use serde_json::json;
use snapstore_host::doctor::{self, Check, Level};

use crate::args::DoctorArgs;
use crate::commands::ended;
use crate::context::Context;
use crate::exit;
use crate::form::Fields;
use crate::format::counted;

const FIELDS: Fields = Fields {
    rows: "checks",
    of_row: &["name", "level", "found", "costs", "mend"],
    of_answer: &["errors", "warnings", "fixed"],
};

pub fn run(context: &Context, args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let context = &context.listing(&args.form, &FIELDS)?;
    let done = match args.fix {
        true => doctor::mend_leftovers()?,
        false => Vec::new(),
    };
    let checks = doctor::examine(&context.store_path()?);
    let count = |level| checks.iter().filter(|check| check.level == level).count();
    let (errors, warnings) = (count(Level::Error), count(Level::Warning));
    let value = json!({
        "checks": checks,
        "errors": errors,
        "warnings": warnings,
        "fixed": done,
    });
    context.answer(&value, || {
        let mut out: String = done.iter().map(|done| format!("{done}\n")).collect();
        out.extend(checks.iter().map(describe));
        out + &match (errors, warnings) {
            (0, 0) => "All is as it should be.".to_owned(),
            (errors, warnings) => format!(
                "{}, {}.",
                counted(errors as u64, "error"),
                counted(warnings as u64, "warning")
            ),
        }
    })?;
    Ok(match errors {
        0 => ExitCode::SUCCESS,
        _ => ended(exit::FAILED, &counted(errors as u64, "error")),
    })
}

fn describe(check: &Check) -> String {
    let level = match check.level {
        Level::Ok => "ok",
        Level::Warning => "warning",
        Level::Error => "error",
    };
    let mut out = format!("{level:<8} {:<15} {}\n", check.name, check.found);
    if !check.costs.is_empty() {
        out += &format!("{:<24} so: {}\n", "", check.costs);
    }
    if !check.mend.is_empty() {
        out += &format!("{:<24} mend: {}\n", "", check.mend);
    }
    out
}
