//! The page of a report in a real browser, without a network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use snapstore_tests::harness::skipped;

use super::{Fixture, pages, with_three};

const NAMES: [&str; 2] = ["chromium", "chromium-browser"];

/// The browser; `None` is told as a skipped test.
fn browser(test: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).flat_map(|dir| NAMES.map(|name| dir.join(name)));
    let found = places.find(|place| place.is_file());
    if found.is_none() {
        skipped(
            test,
            "there is no chromium (Debian: apt-get install chromium)",
        );
    }
    found
}

/// What a page is once its scripts have run, and what the browser said of it.
fn opened(
    browser: &Path,
    dir: &Path,
    page: &str,
    more: &[&str],
) -> anyhow::Result<(String, String)> {
    let output = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ])
        .args([
            "--enable-logging=stderr",
            "--log-level=0",
            "--virtual-time-budget=5000",
        ])
        // Whatever it would load, it does not get.
        .args(["--proxy-server=127.0.0.1:9", "--window-size=1280,1600"])
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .args(more)
        .args(["--dump-dom", &format!("file://{page}")])
        .stdin(Stdio::null())
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().filter(|line| line.contains("CONSOLE"));
    Ok((
        String::from_utf8_lossy(&output.stdout).into_owned(),
        said.collect::<Vec<_>>().join("\n"),
    ))
}

fn report(fixture: &Fixture, browser: &Path) -> anyhow::Result<String> {
    let path = fixture.path("report.html");
    // A damaged store has a page, too.
    fixture.cli.run(&["report", "-o", &path])?;
    let (page, said) = opened(browser, fixture.dir.path(), &path, &[])?;
    ensure!(said.is_empty(), "the browser says: {said}");
    ensure!(
        page.contains("data-drawn=\"yes\""),
        "it was not drawn to the end"
    );
    Ok(page)
}

/// The page as it was drawn, without what it was drawn from.
fn drawn(page: &str) -> anyhow::Result<&str> {
    Ok(page.split_once("id=\"data\"").context("it has data")?.0)
}

#[test]
fn a_browser_draws_a_report() -> anyhow::Result<()> {
    let Some(browser) = browser("a_browser_draws_a_report") else {
        return Ok(());
    };
    let page = report(&with_three()?, &browser)?;
    let drawn = drawn(&page)?;
    for part in [
        "<b>3</b><span>snapshots, 3 tags</span>",
        "<span class=\"tag\">two</span>",
        "id=\"map-about\">memory.bin of ",
        " pages own",
        "class=\"growth-line\" d=\"M",
    ] {
        ensure!(drawn.contains(part), "{part} is not in {drawn}");
    }
    ensure!(drawn.matches("<circle").count() >= 3, "a node each");
    Ok(())
}

#[test]
fn a_browser_draws_stores_without_anything_and_with_damage() -> anyhow::Result<()> {
    let Some(browser) = browser("a_browser_draws_stores_without_anything_and_with_damage") else {
        return Ok(());
    };
    let page = report(&Fixture::new()?, &browser)?;
    ensure!(drawn(&page)?.contains("There are none yet."));
    let fixture = with_three()?;
    fs::write(fixture.packs()?.last().context("packs")?, "")?;
    let page = report(&fixture, &browser)?;
    ensure!(drawn(&page)?.contains("1 thing cannot be read whole"));
    Ok(())
}

/// As many chains side by side as one page may have: a lane each, and none over the tags.
#[test]
fn a_browser_draws_a_hundred_chains_beside_their_tags() -> anyhow::Result<()> {
    let Some(browser) = browser("a_browser_draws_a_hundred_chains_beside_their_tags") else {
        return Ok(());
    };
    const CHAINS: usize = 100;
    let fixture = Fixture::new()?;
    for (kind, more) in [("root", "--no-parent"), ("head", "--parent")] {
        for chain in 0..CHAINS {
            let parent = format!("root-{chain}");
            let mut arguments = vec![more];
            if more == "--parent" {
                arguments.push(&parent);
            }
            fixture.commit(
                &format!("{kind}-{chain}"),
                &pages(&[chain as u64, 7]),
                &arguments,
            )?;
        }
    }
    let page = report(&fixture, &browser)?;
    let shown = drawn(&page)?;
    let number = |text: &str, name: &str| -> anyhow::Result<f64> {
        let rest = text
            .split_once(&format!("{name}=\""))
            .context("no such attribute")?
            .1;
        Ok(rest.split('"').next().unwrap_or_default().parse()?)
    };
    let drawing = shown.split_once("<svg").context("no graph")?.1;
    let drawing = drawing.split("</svg>").next().unwrap_or_default();
    let width = number(drawing, "width")?;
    let mut lanes = 0;
    for circle in drawing.split("<circle").skip(1) {
        let at = number(circle, "cx")?;
        ensure!(at < width - 4.0, "a lane at {at} of {width}");
        lanes += 1;
    }
    ensure!(lanes == 2 * CHAINS, "{lanes}");
    Ok(())
}

/// Names that people gave are text, whatever they are.
#[test]
fn a_browser_runs_nothing_that_a_label_says() -> anyhow::Result<()> {
    let Some(browser) = browser("a_browser_runs_nothing_that_a_label_says") else {
        return Ok(());
    };
    let fixture = Fixture::new()?;
    let hostile = [
        "</script><script>document.title='taken'</script>",
        "\"><img src=x onerror=document.title='taken'>",
        "' onload='document.title=1",
        "<!--<script>",
        "\u{2028}</style>&lt;b&gt;",
    ];
    let labels: Vec<String> = hostile
        .iter()
        .zip(0..)
        .map(|(it, at)| format!("k{at}={it}"))
        .collect();
    let labels: Vec<&str> = labels
        .iter()
        .flat_map(|it| ["--label", it.as_str()])
        .collect();
    fixture.commit("one", &pages(&[1, 2]), &labels)?;
    let page = report(&fixture, &browser)?;
    let shown = drawn(&page)?;
    ensure!(!shown.contains("<title>taken"), "a label was run");
    ensure!(!page.contains("<img"), "a label was taken for an element");
    // They are all there, as text.
    for text in [
        "&lt;/script&gt;&lt;script&gt;document.title",
        "&lt;img src=x",
        "&amp;lt;b&amp;gt;",
    ] {
        ensure!(shown.contains(text), "{text} is not in {shown}");
    }
    Ok(())
}

/// Without its number a script does not run: this is what keeps out what no other test
/// thinks of.
#[test]
fn a_browser_refuses_scripts_that_are_not_the_pages_own() -> anyhow::Result<()> {
    let Some(browser) = browser("a_browser_refuses_scripts_that_are_not_the_pages_own") else {
        return Ok(());
    };
    let fixture = with_three()?;
    let path = fixture.path("report.html");
    fixture.cli.ok(&["report", "-o", &path])?;
    let page = fs::read_to_string(&path)?;
    let put =
        "<script>document.title='taken'</script><img src=\"https://host.example/x.png\"></body>";
    fs::write(&path, page.replace("</body>", put))?;
    let (page, said) = opened(&browser, fixture.dir.path(), &path, &[])?;
    ensure!(!page.contains("<title>taken"), "it was run");
    let refused = said.matches("Content Security Policy").count();
    ensure!(refused >= 2, "the browser says: {said}");
    Ok(())
}
