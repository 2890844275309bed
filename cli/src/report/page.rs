//! The page: one file that needs no other.

use std::fmt::Write as _;

use anyhow::Context as _;
use serde_json::Value;

const STYLE: &str = include_str!("page/style.css");
const BODY: &str = include_str!("page/body.html");
/// In the order in which they run.
const SCRIPTS: [&str; 4] = [
    include_str!("page/common.js"),
    include_str!("page/map.js"),
    include_str!("page/charts.js"),
    include_str!("page/main.js"),
];

/// The whole page. The browser runs no script and uses no style but those that have this
/// page's own random number, and loads nothing: names that people gave cannot change that.
pub fn page(data: &Value) -> anyhow::Result<String> {
    let nonce = nonce()?;
    let data = embedded(&serde_json::to_string(data)?);
    let scripts = SCRIPTS.join("\n");
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; base-uri 'none'; \
         form-action 'none'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n\
         <title>snapstore report</title>\n<style nonce=\"{nonce}\">\n{STYLE}</style>\n</head>\n\
         <body>\n{BODY}\n<script type=\"application/json\" id=\"data\">{data}</script>\n\
         <script nonce=\"{nonce}\">\n\"use strict\";\n(() => {{\n{scripts}\n}})();\n</script>\n\
         </body>\n</html>\n"
    ))
}

/// JSON that can stand in a page: nothing of it ends the element that it is in, or
/// begins another one.
fn embedded(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for letter in json.chars() {
        match letter {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(letter));
            }
            letter => out.push(letter),
        }
    }
    out
}

fn nonce() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    let got = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
        .context("cannot get random numbers")?;
    anyhow::ensure!(got == bytes.len(), "cannot get enough random numbers");
    Ok(bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_cannot_leave_the_data() {
        let name = "</script><script>alert(1)</script><!-- \"quoted\" & \u{2028}";
        let data = json!({"tag": name});
        let made = page(&data).unwrap();
        assert!(!made.contains("alert(1)</script>"), "{made}");
        let begins = made.find("id=\"data\">").unwrap() + "id=\"data\">".len();
        let inner = &made[begins..begins + made[begins..].find("</script>").unwrap()];
        assert!(!inner.contains('<'), "{inner}");
        assert_eq!(serde_json::from_str::<Value>(inner).unwrap(), data);
    }

    #[test]
    fn the_page_needs_no_other_file() {
        let made = page(&json!({})).unwrap();
        for outside in ["http://", "https://", "src=", "@import", "url(", "href="] {
            let own = made.replace("http://www.w3.org/2000/svg", "");
            assert!(!own.contains(outside), "{outside}");
        }
        assert_ne!(page(&json!({})).unwrap(), made, "the number is random");
    }
}
