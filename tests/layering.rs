//! The layers of the crate, held to their order.
//!
//! Reads the sources as text and fails on
//!
//! - a path `crate::<layer>` that does not point strictly downward,
//! - a crate used outside the one layer that is its door,
//! - a file without a module doc, or of more than 600 lines.
//!
//! Tests inside the sources are read as well: they know no more than what they test. Comments and
//! literals are not read. A `super::` cannot leave a layer unnoticed: one that climbs to
//! the crate's root is refused.
//!
//! # The order
//!
//! `cli > daemon > config > observe = fuse > vfs > namespace > upload > store > tier > base`. The three at the
//! top are wiring: the command line starts the daemon, both read settings, and settings know nothing
//! of who reads them. The two fronts do not know each other.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Every layer with its height. Equals may not import each other.
const LAYERS: [(&str, u32); 11] = [
    ("cli", 10),
    ("daemon", 9),
    ("config", 8),
    ("fuse", 7),
    ("observe", 7),
    ("vfs", 6),
    ("namespace", 5),
    ("upload", 4),
    ("store", 3),
    ("tier", 2),
    ("base", 1),
];

/// What the names of crates begin with, and where they may be used.
const DOORS: [(&str, &str); 3] = [
    ("fuser", "fuse"),
    ("aws_", "tier/s3"),
    ("rusqlite", "store/index"),
];

const MAX_LINES: usize = 600;

fn height(layer: &str) -> Option<u32> {
    LAYERS
        .iter()
        .find(|(name, _)| *name == layer)
        .map(|(_, height)| *height)
}

/// Blanks comments, strings and characters, keeping lines as they are.
fn code_of(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at);
        if end > at {
            code.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at = end;
        } else {
            code.push(chars[at]);
            at += 1;
        }
    }
    code
}

/// Where the comment or literal that begins at `at` ends; `at` when none does.
fn literal_end(chars: &[char], at: usize) -> usize {
    let is = |offset: usize, text: &str| {
        text.chars()
            .enumerate()
            .all(|(index, c)| chars.get(at + offset + index) == Some(&c))
    };
    let in_word = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    if is(0, "//") {
        return chars[at..]
            .iter()
            .position(|&c| c == '\n')
            .map_or(chars.len(), |len| at + len);
    }
    if is(0, "/*") {
        return comment_end(chars, at);
    }
    if is(0, "\"") {
        return string_end(chars, at + 1);
    }
    if is(0, "'") {
        return char_end(chars, at);
    }
    // b"", c"", r"", br"", cr"" with any number of #.
    if !in_word && matches!(chars[at], 'b' | 'c' | 'r') {
        let mut next = at + 1;
        let raw = chars[at] == 'r' || chars.get(next) == Some(&'r');
        next += usize::from(chars[at] != 'r' && raw);
        let hashes = chars[next..].iter().take_while(|&&c| raw && c == '#').count();
        if chars.get(next + hashes) == Some(&'"') {
            let start = next + hashes + 1;
            return if raw {
                raw_end(chars, start, hashes)
            } else {
                string_end(chars, start)
            };
        }
    }
    at
}

fn comment_end(chars: &[char], at: usize) -> usize {
    let (mut depth, mut at) = (0, at);
    while at < chars.len() {
        match chars[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string_end(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

fn raw_end(chars: &[char], mut at: usize, hashes: usize) -> usize {
    while at < chars.len() {
        let closes = chars[at] == '"' && chars[at + 1..].iter().take_while(|&&c| c == '#').count() >= hashes;
        if closes {
            return at + 1 + hashes;
        }
        at += 1;
    }
    chars.len()
}

/// A quote begins a character, or the name of a lifetime.
fn char_end(chars: &[char], at: usize) -> usize {
    match chars[at + 1..] {
        ['\\', _, ..] => chars[at + 3..]
            .iter()
            .position(|&c| c == '\'')
            .map_or(chars.len(), |len| at + 3 + len + 1),
        [_, '\'', ..] => at + 3,
        _ => at,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    /// `::`
    Path,
    Other(char),
}

fn tokens_of(code: &str) -> Vec<(usize, Token)> {
    let mut tokens = Vec::new();
    for (line, text) in code.lines().enumerate() {
        let chars: Vec<char> = text.chars().collect();
        let mut at = 0;
        while at < chars.len() {
            let word: String = chars[at..]
                .iter()
                .take_while(|c| c.is_alphanumeric() || **c == '_')
                .collect();
            if !word.is_empty() {
                at += word.chars().count();
                tokens.push((line + 1, Token::Word(word)));
                continue;
            }
            if chars[at..].starts_with(&[':', ':']) {
                tokens.push((line + 1, Token::Path));
                at += 2;
                continue;
            }
            if !chars[at].is_whitespace() {
                tokens.push((line + 1, Token::Other(chars[at])));
            }
            at += 1;
        }
    }
    tokens
}

/// The names that directly follow `crate::`, in a path or in the braces behind it.
fn names_behind(tokens: &[(usize, Token)]) -> Vec<(usize, String)> {
    match tokens {
        [(line, Token::Word(name)), ..] => vec![(*line, name.clone())],
        [(line, Token::Other('*')), ..] => vec![(*line, "*".to_owned())],
        [(_, Token::Other('{')), rest @ ..] => {
            let mut names = Vec::new();
            let (mut depth, mut fresh) = (1, true);
            for (line, token) in rest {
                match token {
                    Token::Other('{') => depth += 1,
                    Token::Other('}') => depth -= 1,
                    Token::Other(',') if depth == 1 => fresh = true,
                    Token::Word(name) if depth == 1 && fresh => {
                        names.push((*line, name.clone()));
                        fresh = false;
                    }
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
            names
        }
        _ => Vec::new(),
    }
}

/// Checks one file; `path` is relative to `src`, with `/`.
fn complaints(path: &str, source: &str) -> Vec<String> {
    let mut found = Vec::new();
    if source.lines().count() > MAX_LINES {
        found.push(format!("{path}: more than {MAX_LINES} lines"));
    }
    if !source.trim_start().starts_with("//!") {
        found.push(format!("{path}: no module doc"));
    }
    let layer = path.split(['/', '.']).next().expect("a split has a first part");
    let above = height(layer);
    // Modules between the crate's root and this file.
    let depth = path
        .trim_end_matches(".rs")
        .trim_end_matches("/mod")
        .split('/')
        .count();
    let tokens = tokens_of(&code_of(source));
    let mut supers = 0;
    for (index, (line, token)) in tokens.iter().enumerate() {
        let Token::Word(word) = token else {
            if *token != Token::Path {
                supers = 0;
            }
            continue;
        };
        let starts_path = tokens
            .get(index + 1)
            .is_some_and(|(_, next)| *next == Token::Path);
        // A leading `::` names a crate, one behind a word something in a module.
        let ends_path = match tokens[..index] {
            [.., (_, Token::Word(ref before)), (_, Token::Path)] => before != "use",
            _ => false,
        };
        supers = if word == "super" { supers + 1 } else { 0 };
        if above.is_some() && supers >= depth && !is_in_inner_module(&tokens[..index]) {
            found.push(format!("{path}:{line}: climbs to the crate's root with super"));
        }
        if word == "crate" && starts_path {
            for (line, name) in names_behind(&tokens[index + 2..]) {
                let below = height(&name);
                let down = above.is_none() || name == layer || below.is_some_and(|below| Some(below) < above);
                if !down {
                    found.push(format!("{path}:{line}: {layer} must not import {name}"));
                }
            }
        }
        let imported = starts_path || index > 0 && tokens[index - 1].1 == Token::Word("use".to_owned());
        for (name, door) in DOORS {
            let named = if name.ends_with('_') {
                word.starts_with(name)
            } else {
                word == name
            };
            if named && imported && !ends_path && !path.starts_with(door) {
                found.push(format!("{path}:{line}: {word} outside src/{door}"));
            }
        }
    }
    found
}

/// Whether braces of a `mod name {` are open: a `super` counts from there.
fn is_in_inner_module(tokens: &[(usize, Token)]) -> bool {
    let mut open = Vec::new();
    for (index, (_, token)) in tokens.iter().enumerate() {
        match token {
            Token::Other('{') => open.push(
                index >= 2
                    && matches!(tokens[index - 1].1, Token::Word(_))
                    && tokens[index - 2].1 == Token::Word("mod".to_owned()),
            ),
            Token::Other('}') => {
                open.pop();
            }
            _ => {}
        }
    }
    open.contains(&true)
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|err| panic!("{}: {err}", dir.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn imports_point_downward_and_files_are_short_and_say_what_they_do() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    files.sort();
    assert!(files.len() > 40, "{} files are not the whole crate", files.len());
    let mut found = Vec::new();
    for path in files {
        let relative = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let layer = relative.split(['/', '.']).next().unwrap();
        assert!(
            height(layer).is_some() || ["lib", "main"].contains(&layer),
            "{relative} is in no layer; name its height in this test"
        );
        found.extend(complaints(&relative, &fs::read_to_string(&path).unwrap()));
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

fn count(path: &str, body: &str) -> usize {
    complaints(path, &format!("//! Doc.\n{body}")).len()
}

#[test]
fn an_import_that_points_up_or_sideways_is_found() {
    for (path, body) in [
        ("store/blobs.rs", "use crate::vfs::Vfs;"),
        (
            "store/blobs.rs",
            "use crate::{base::digest::Digest, upload::UploadStatus};",
        ),
        (
            "store/blobs.rs",
            "use crate::{\n    base::{digest::Digest, id},\n    fuse,\n};",
        ),
        ("tier/mod.rs", "fn f() { crate::store::open(); }"),
        ("observe/mod.rs", "use crate::fuse::Mounted;"),
        ("config/mod.rs", "use crate::daemon::run;"),
        ("daemon/mod.rs", "use crate::cli::run;"),
        ("base/mod.rs", "use crate::*;"),
        ("base/mod.rs", "use crate::unheard_of::Thing;"),
        ("base/clock.rs", "use super::super::store;"),
        ("base/mod.rs", "use super::store;"),
        (
            "upload/mod.rs",
            "/* a /* nested */ comment */ use crate::namespace::tree; // text",
        ),
        (
            "upload/mod.rs",
            "const C: char = '\"'; use crate::namespace::tree; const D: char = '\"';",
        ),
        (
            "upload/mod.rs",
            "fn f<'a>(x: &'a str) {} use crate::namespace::tree;",
        ),
        (
            "upload/mod.rs",
            r##"const R: &str = r#"a " b"#; use crate::namespace::tree;"##,
        ),
    ] {
        assert_eq!(count(path, body), 1, "{path}: {body}");
    }
}

#[test]
fn an_import_that_points_down_is_not() {
    for (path, body) in [
        (
            "vfs/mod.rs",
            "use crate::{namespace::tree::Tree, store::Store, vfs::open};",
        ),
        ("cli/mod.rs", "use crate::{config, daemon};"),
        ("daemon/mod.rs", "use crate::{config::Config, fuse, observe};"),
        ("lib.rs", "pub mod cli; pub use crate::cli::run;"),
        ("store/blobs.rs", "use super::StoreError;"),
        ("namespace/follow/cursor.rs", "use super::super::tree;"),
        (
            "base/units.rs",
            "mod tests { use super::*; mod deeper { use super::super::*; } }",
        ),
        (
            "base/units.rs",
            "// use crate::vfs::Vfs;\n/// [`crate::vfs::Vfs`]\n/* crate::vfs::x */",
        ),
        (
            "base/units.rs",
            "const S: &str = \"crate::vfs::Vfs \\\" crate::vfs::x\";",
        ),
        ("base/units.rs", r##"const S: &[u8] = br#"crate::vfs::"x"#;"##),
        (
            "base/units.rs",
            "const C: char = '\\''; const D: char = 'x'; fn f<'a>() {}",
        ),
    ] {
        assert_eq!(
            complaints(path, &format!("//! Doc.\n{body}")),
            [""; 0],
            "{path}: {body}"
        );
    }
}

#[test]
fn a_crate_outside_its_door_is_found() {
    for (path, body) in [
        ("vfs/mod.rs", "use fuser::FileAttr;"),
        ("vfs/mod.rs", "fn f(attr: fuser::FileAttr) {}"),
        ("tier/dir.rs", "use aws_sdk_s3::Client;"),
        ("tier/mod.rs", "use aws_config;"),
        ("store/ledger.rs", "use rusqlite::Connection;"),
        ("store/ledger.rs", "use ::rusqlite::Connection;"),
    ] {
        assert_eq!(count(path, body), 1, "{path}: {body}");
    }
    for (path, body) in [
        ("fuse/adaptor.rs", "use fuser::FileAttr;"),
        ("tier/s3.rs", "use aws_sdk_s3::Client;"),
        ("tier/s3/body.rs", "use aws_smithy_types::body::SdkBody;"),
        ("store/index.rs", "use rusqlite::Connection;"),
        ("store/index/schema.rs", "use rusqlite::Connection;"),
        ("vfs/mod.rs", "let fuser = 1; // fuser::x"),
        ("vfs/mod.rs", "fn f() { self::fuser::reply(); }"),
        ("vfs/mod.rs", "const S: &str = \"fuser::FileAttr\";"),
    ] {
        assert_eq!(count(path, body), 0, "{path}: {body}");
    }
}

#[test]
fn a_long_file_and_one_without_a_doc_are_found() {
    assert_eq!(complaints("base/x.rs", "use std::io;\n").len(), 1);
    assert_eq!(
        complaints("base/x.rs", &format!("//! Doc.\n{}", "\n".repeat(599))).len(),
        0
    );
    assert_eq!(
        complaints("base/x.rs", &format!("//! Doc.\n{}", "\n".repeat(600))).len(),
        1
    );
}
