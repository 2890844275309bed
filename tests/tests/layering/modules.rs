//! The modules of each crate have an order: no file needs one that needs it.
//!
//! A file needs what its paths lead to: in `use`, in types, in expressions. A path through
//! the `pub use` of a module leads to where the thing is defined, so a module that only
//! hands on names ties nothing together. Tests are left out. Macros' arguments are not read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, Meta, UseTree, Visibility};

/// The crates that are shipped, each with its first file.
const CRATES: [&str; 12] = [
    "store/src/lib.rs",
    "overlay/src/lib.rs",
    "remote/src/lib.rs",
    "fuse/src/lib.rs",
    "vmm/src/lib.rs",
    "vmm/agent-protocol/src/lib.rs",
    "vmm/agent/src/lib.rs",
    "vmm/agent/src/main.rs",
    "vmm/guests/src/lib.rs",
    "host/src/lib.rs",
    "cli/src/main.rs",
    "cli/src/machine.rs",
];

/// Arrows that run back up and are known: where they end should move below where they
/// begin. None is to be added.
const KNOWN: [(&str, &str); 15] = [
    ("host/src/commit/precopy.rs", "host/src/commit/mod.rs"),
    ("host/src/runtime/mod.rs", "host/src/mounts.rs"),
    ("store/src/commit/precopy.rs", "store/src/commit/mod.rs"),
    ("store/src/gc/delete.rs", "store/src/gc/mod.rs"),
    ("store/src/pin.rs", "store/src/store.rs"),
    ("vmm/src/machine/freeze.rs", "vmm/src/machine/mod.rs"),
    ("vmm/src/machine/precopy.rs", "vmm/src/machine/mod.rs"),
    ("vmm/src/state/cpu.rs", "vmm/src/state/host.rs"),
    ("vmm/src/state/cpu.rs", "vmm/src/state/machine.rs"),
    ("vmm/src/state/cpuid.rs", "vmm/src/state/machine.rs"),
    ("vmm/src/state/feature_msrs.rs", "vmm/src/state/msrs.rs"),
    ("vmm/src/state/host.rs", "vmm/src/state/machine.rs"),
    ("vmm/src/state/msrs.rs", "vmm/src/state/machine.rs"),
    ("vmm/src/state/xsave.rs", "vmm/src/state/host.rs"),
    ("vmm/src/state/xsave.rs", "vmm/src/state/machine.rs"),
];

#[test]
fn no_file_needs_one_that_needs_it() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let known = KNOWN.map(|(from, to)| (root.join(from), root.join(to)));
    let mut found = String::new();
    for first in CRATES {
        for circle in Crate::read(&root.join(first))?.circles(&known) {
            found += &format!("\n{first}:\n{circle}");
        }
    }
    if !found.is_empty() {
        bail!("these files need each other; move what ties them to a file below both:{found}");
    }
    Ok(())
}

#[test]
fn a_circle_is_found() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text);
    write("lib.rs", "mod a; mod b; mod face; mod c;")?;
    write("face.rs", "pub use crate::c::Thing;")?;
    write("a.rs", "use crate::b::f; pub fn g() { f() }")?;
    write("c.rs", "pub struct Thing;")?;
    // Through a module's face, and by a whole path in an expression.
    write("b.rs", "pub fn f() -> crate::face::Thing { super::a::g() }")?;
    let circles = Crate::read(&dir.path().join("lib.rs"))?.circles(&[]);
    assert_eq!(circles.len(), 1, "{circles:?}");
    assert!(circles[0].contains("a.rs") && circles[0].contains("b.rs"));
    assert!(!circles[0].contains("c.rs") && !circles[0].contains("face.rs"));
    // A test may need what it likes.
    write(
        "b.rs",
        "pub fn f() {} #[cfg(test)] mod tests { use crate::a::g; }",
    )?;
    assert!(
        Crate::read(&dir.path().join("lib.rs"))?
            .circles(&[])
            .is_empty()
    );
    Ok(())
}

/// A path from the crate's root.
type Name = Vec<String>;

#[derive(Default)]
struct Crate {
    modules: BTreeMap<Name, Module>,
    /// The directory of its first file.
    dir: PathBuf,
}

struct Module {
    file: PathBuf,
    /// What `use` gives a name in it, from the crate's root; `*` for all of a module.
    aliases: Vec<(String, Name)>,
    /// What it names, but for what it only hands on.
    named: Vec<Name>,
}

impl Crate {
    fn read(first: &Path) -> anyhow::Result<Self> {
        let dir = first.parent().context("a file is in a directory")?;
        let mut read = Self {
            dir: dir.to_owned(),
            ..Self::default()
        };
        read.add_file(Vec::new(), first.to_owned(), dir)?;
        Ok(read)
    }

    /// Reads a file as the module of this name; its modules are in `dir`.
    fn add_file(&mut self, name: Name, file: PathBuf, dir: &Path) -> anyhow::Result<()> {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let parsed = syn::parse_file(&text).with_context(|| file.display().to_string())?;
        self.add_items(name, &file, dir, &parsed.items)
    }

    fn add_items(
        &mut self,
        name: Name,
        file: &Path,
        dir: &Path,
        items: &[Item],
    ) -> anyhow::Result<()> {
        let mut module = Module {
            file: file.to_owned(),
            aliases: Vec::new(),
            named: Vec::new(),
        };
        for item in items.iter().filter(|item| !is_test(attributes(item))) {
            match item {
                Item::Use(item) => module.add_use(&name, item),
                Item::Mod(inner) => {
                    let ident = inner.ident.to_string();
                    let name = [name.as_slice(), std::slice::from_ref(&ident)].concat();
                    if let Some((_, items)) = &inner.content {
                        self.add_items(name, file, &dir.join(&ident), items)?;
                        continue;
                    }
                    let own = dir.join(&ident);
                    let paths = [own.join("mod.rs"), dir.join(format!("{ident}.rs"))];
                    let found = paths.into_iter().find(|path| path.is_file());
                    let found = found.with_context(|| format!("no file of {}", name.join("::")))?;
                    self.add_file(name, found, &own)?;
                }
                item => Paths {
                    module: &mut module,
                    of: &name,
                }
                .visit_item(item),
            }
        }
        self.modules.insert(name, module);
        Ok(())
    }

    /// The file in which what a path leads to is defined; none if it is not of this crate.
    fn file_of(&self, path: &Name, depth: usize) -> Option<&Path> {
        if depth == 0 {
            return None;
        }
        let mut at = Name::new();
        for (position, segment) in path.iter().enumerate() {
            let next = [at.as_slice(), std::slice::from_ref(segment)].concat();
            if self.modules.contains_key(&next) {
                at = next;
                continue;
            }
            let module = self.modules.get(&at)?;
            let rest = &path[position + 1..];
            let alias = module.aliases.iter().find(|(alias, _)| alias == segment);
            if let Some((_, target)) = alias {
                return self.file_of(&[target.as_slice(), rest].concat(), depth - 1);
            }
            return Some(&module.file);
        }
        // A module itself: what is taken of it is named elsewhere.
        None
    }

    fn needs(&self) -> BTreeMap<&Path, BTreeMap<&Path, BTreeSet<String>>> {
        let mut needs: BTreeMap<_, BTreeMap<_, BTreeSet<_>>> = BTreeMap::new();
        for module in self.modules.values() {
            for path in &module.named {
                let Some(file) = self.file_of(path, 16).filter(|file| *file != module.file) else {
                    continue;
                };
                let of = needs.entry(module.file.as_path()).or_default();
                of.entry(file).or_default().insert(path.join("::"));
            }
        }
        needs
    }

    /// Each set of files that all need each other, as text.
    fn circles(&self, known: &[(PathBuf, PathBuf)]) -> Vec<String> {
        let mut needs = self.needs();
        for (from, to) in known {
            if let Some(of) = needs.get_mut(from.as_path()) {
                of.remove(to.as_path());
            }
        }
        let reached: BTreeMap<&Path, BTreeSet<&Path>> = needs
            .keys()
            .map(|file| (*file, reachable(file, &needs)))
            .collect();
        let is_mutual = |a: &Path, b: &Path| {
            let reaches = |a: &Path, b: &Path| reached.get(a).is_some_and(|set| set.contains(b));
            reaches(a, b) && reaches(b, a)
        };
        let mut circles = Vec::new();
        let mut seen = BTreeSet::new();
        for file in needs.keys() {
            let circle: Vec<_> = needs
                .keys()
                .filter(|other| is_mutual(file, other))
                .collect();
            if circle.is_empty() || !seen.insert(circle.clone()) {
                continue;
            }
            let mut text = String::new();
            for from in &circle {
                for (to, names) in needs[**from].iter().filter(|(to, _)| circle.contains(to)) {
                    let names = names.iter().cloned().collect::<Vec<_>>().join(", ");
                    text += &format!("  {} -> {}: {names}\n", self.short(from), self.short(to));
                }
            }
            circles.push(text);
        }
        circles
    }

    fn short(&self, file: &Path) -> String {
        let short = file.strip_prefix(&self.dir).unwrap_or(file);
        short.display().to_string()
    }
}

fn reachable<'a>(
    from: &'a Path,
    needs: &BTreeMap<&'a Path, BTreeMap<&'a Path, BTreeSet<String>>>,
) -> BTreeSet<&'a Path> {
    let mut reached = BTreeSet::new();
    let mut open = vec![from];
    while let Some(file) = open.pop() {
        for next in needs.get(file).into_iter().flat_map(BTreeMap::keys) {
            if reached.insert(*next) {
                open.push(next);
            }
        }
    }
    reached
}

impl Module {
    fn add_use(&mut self, of: &Name, item: &ItemUse) {
        let hands_on = !matches!(item.vis, Visibility::Inherited);
        let mut leaves = Vec::new();
        flatten(&item.tree, &mut Vec::new(), &mut leaves);
        for (alias, path) in leaves {
            // Else from here: a module below this one, or another crate.
            let path = absolute(of, &path).unwrap_or_else(|| [of.as_slice(), &path].concat());
            self.aliases.push((alias, path.clone()));
            if !hands_on {
                self.named.push(path);
            }
        }
    }
}

/// Each name that a `use` gives, and the path that it stands for.
fn flatten(tree: &UseTree, before: &mut Name, leaves: &mut Vec<(String, Name)>) {
    match tree {
        UseTree::Path(path) => {
            before.push(path.ident.to_string());
            flatten(&path.tree, before, leaves);
            before.pop();
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                flatten(tree, before, leaves);
            }
        }
        UseTree::Name(name) if name.ident == "self" => {
            leaves.extend(before.last().map(|last| (last.clone(), before.clone())));
        }
        UseTree::Name(name) => {
            let name = name.ident.to_string();
            leaves.push((name.clone(), [before.as_slice(), &[name]].concat()));
        }
        UseTree::Rename(name) => {
            let path = [before.as_slice(), &[name.ident.to_string()]].concat();
            leaves.push((name.rename.to_string(), path));
        }
        UseTree::Glob(_) => {
            leaves.push((
                "*".to_owned(),
                [before.as_slice(), &["*".to_owned()]].concat(),
            ));
        }
    }
}

/// A path from the crate's root, if it says from where it goes.
fn absolute(of: &Name, path: &[String]) -> Option<Name> {
    let mut at = of.clone();
    let mut rest = path;
    match rest.first()?.as_str() {
        "crate" => at.clear(),
        "self" => {}
        "super" => {
            at.pop()?;
        }
        _ => return None,
    }
    rest = &rest[1..];
    while rest.first().is_some_and(|first| first == "super") {
        at.pop()?;
        rest = &rest[1..];
    }
    Some([at.as_slice(), rest].concat())
}

/// Finds the paths in an item.
struct Paths<'a> {
    module: &'a mut Module,
    of: &'a Name,
}

impl<'ast> Visit<'ast> for Paths<'_> {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Name = path
            .segments
            .iter()
            .map(|one| one.ident.to_string())
            .collect();
        let path_from_root = absolute(self.of, &segments);
        // Else by the names of this module: a `use`, or a module below it.
        let is_longer = segments.len() > 1;
        let path_from_here = || is_longer.then(|| [self.of.as_slice(), &segments].concat());
        self.module
            .named
            .extend(path_from_root.or_else(path_from_here));
        visit::visit_path(self, path);
    }

    fn visit_stmt(&mut self, statement: &'ast syn::Stmt) {
        let attributes: &[Attribute] = match statement {
            syn::Stmt::Local(local) => &local.attrs,
            syn::Stmt::Expr(syn::Expr::Call(call), _) => &call.attrs,
            syn::Stmt::Expr(syn::Expr::MethodCall(call), _) => &call.attrs,
            syn::Stmt::Expr(syn::Expr::Block(block), _) => &block.attrs,
            _ => &[],
        };
        if !is_test(attributes) {
            visit::visit_stmt(self, statement);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.module.add_use(self.of, item);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }
}

/// Whether something is there for tests only.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            let condition = list.tokens.to_string();
            condition.contains("test") && !condition.contains("not")
        }
        meta => meta.path().is_ident("test"),
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}
