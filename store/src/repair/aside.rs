//! Setting aside what is damaged: it may hold what somebody can still read.

use std::fs;
use std::path::Path;

use crate::durable;
use crate::error::Result;
use crate::layout::Layout;

/// Moves a file, or what stands in the place of one, to `damaged/`, under a name that
/// nothing has there: what was set aside before is never replaced.
pub(super) fn set_aside(layout: &Layout, path: &Path) -> Result<()> {
    let dir = layout.damaged();
    durable::make_dir(&dir)?;
    let name = path.file_name().unwrap_or_default();
    let free = (0_u32..).find_map(|number| {
        let mut name = name.to_owned();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        let to = dir.join(name);
        fs::symlink_metadata(&to).is_err().then_some(to)
    });
    durable::rename(path, &free.expect("numbers do not run out"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_aside_before_stays() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_owned());
        let path = dir.path().join("00000001.pack");
        for content in ["one", "two", "three"] {
            fs::write(&path, content).unwrap();
            set_aside(&layout, &path).unwrap();
            assert!(!path.exists());
        }
        let aside = |name: &str| fs::read_to_string(layout.damaged().join(name)).unwrap();
        let names = ["00000001.pack", "00000001.pack.1", "00000001.pack.2"];
        assert_eq!(names.map(aside), ["one", "two", "three"]);
    }
}
