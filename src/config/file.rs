//! The settings file: TOML, one key a setting, no tables.
//!
//! ```toml
//! store = "s3://my-bucket/cache"
//! volume = "main"
//! cache-size = "60G"
//! read-only = false
//! preset = ["bazel=bazel", "cc=ccache"]
//! ```
//!
//! Keys are the names of the flags; values are strings as on the command
//! line, or TOML's own numbers and booleans.

use std::{fs, io, path::Path};

use super::{ConfigError, Layer, layer::SetError};

/// Reads a file; `None` if there is none.
pub fn read_if_there(path: &Path) -> Result<Option<Layer>, ConfigError> {
    match fs::read_to_string(path) {
        Ok(text) => parse(path, &text).map(Some),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::File {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Reads a file that the user named: it has to be there.
pub fn read(path: &Path) -> Result<Layer, ConfigError> {
    read_if_there(path)?.ok_or_else(|| ConfigError::File {
        path: path.to_owned(),
        source: io::ErrorKind::NotFound.into(),
    })
}

fn parse(path: &Path, text: &str) -> Result<Layer, ConfigError> {
    let table: toml::Table = toml::from_str(text).map_err(|err: toml::de::Error| {
        let at = err.span().map_or(0, |span| span.start.min(text.len()));
        ConfigError::Syntax {
            path: path.to_owned(),
            line: text[..at].matches('\n').count() + 1,
            why: err.message().replace('\n', ", "),
        }
    })?;
    let mut layer = Layer::default();
    for (key, value) in &table {
        let origin = format!("the setting {key:?} in {}", path.display());
        let value = text_of(key, value).map_err(|why| ConfigError::BadValue {
            origin: origin.clone(),
            why,
        });
        // An unknown key is reported as one, whatever its value is.
        let outcome = if Layer::KEYS.contains(&key.as_str()) {
            layer.set(key, &value?)
        } else {
            Err(SetError::UnknownKey)
        };
        outcome.map_err(|err| match err {
            SetError::UnknownKey => ConfigError::UnknownKey {
                origin: format!("the settings file {}", path.display()),
                key: key.clone(),
                known: Layer::KEYS.join(", "),
            },
            SetError::BadValue(why) => ConfigError::BadValue { origin, why },
        })?;
    }
    Ok(layer)
}

fn text_of(key: &str, value: &toml::Value) -> Result<String, String> {
    match value {
        // TOML reads 022 as an error and 22 as decimal: only a string is unmistakable.
        toml::Value::Integer(_) if key == "umask" => Err("write it in quotes, as \"022\"".to_owned()),
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(switch) => Ok(switch.to_string()),
        toml::Value::Array(items) if key == "preset" => {
            let texts = items.iter().map(|item| item.as_str().map(str::to_owned));
            let texts: Option<Vec<String>> = texts.collect();
            Ok(texts
                .ok_or_else(|| "write each as \"DIR=NAME\"".to_owned())?
                .join(","))
        }
        toml::Value::Datetime(_) | toml::Value::Array(_) | toml::Value::Table(_) => {
            Err(format!("a {} is no value here", value.type_str()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<Layer, ConfigError> {
        parse(Path::new("/etc/casmount/config.toml"), text)
    }

    #[test]
    fn a_file_reads_as_its_author_meant() {
        let layer = parse_text(
            "store = 's3://b/p'\ncache-size = \"60G\"\nmin-free = 1024\nread-only = true\nsettle = \"500ms\"\nread-timeout = 5\numask = '022'\n",
        )
        .unwrap();
        assert_eq!(layer.store.as_deref(), Some("s3://b/p"));
        assert_eq!(layer.cache_size, Some(60 << 30));
        assert_eq!(layer.min_free, Some(1024));
        assert_eq!(layer.read_only, Some(true));
        assert_eq!(layer.settle, Some(std::time::Duration::from_millis(500)));
        assert_eq!(layer.read_timeout, Some(std::time::Duration::from_secs(5)));
        assert_eq!(layer.umask, Some(0o022));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file() {
        for text in ["cache_size = '60G'", "[store]\nurl = 'x'\n[stor]\n"] {
            let err = parse_text(text).unwrap_err().to_string();
            assert!(err.contains("/etc/casmount/config.toml"), "{err}");
            assert!(!err.contains('\n'), "{err}");
        }
        let err = parse_text("cache_size = '60G'").unwrap_err();
        assert!(matches!(err, ConfigError::UnknownKey { ref key, .. } if key == "cache_size"));
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        let err = parse_text("store = 'a'\nvolume = \n").unwrap_err();
        assert!(matches!(err, ConfigError::Syntax { line: 2, .. }), "{err:?}");
    }

    #[test]
    fn presets_are_a_list_or_a_text() {
        for text in [
            "preset = ['a=bazel', 'b/c=plain']",
            "preset = 'a=bazel, b/c=plain'",
        ] {
            let presets = parse_text(text).unwrap().preset.unwrap();
            let presets: Vec<String> = presets.iter().map(ToString::to_string).collect();
            assert_eq!(presets, ["a=bazel", "b/c=plain"], "{text}");
        }
        for text in ["preset = [1]", "preset = ['a=make']", "read-only = ['a']"] {
            assert!(parse_text(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_number_is_no_umask() {
        assert!(parse_text("umask = 22").is_err());
    }

    #[test]
    fn an_absent_file_is_nothing_unless_it_was_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        assert!(read_if_there(&path).unwrap().is_none());
        assert!(matches!(read(&path), Err(ConfigError::File { .. })));
    }
}
