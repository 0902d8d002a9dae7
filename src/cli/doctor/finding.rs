//! What a check found.

use std::fmt::Write as _;

use serde::Serialize;

/// Worse is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Ok,
    /// A mount works, but slower or less safe than it could be.
    Warn,
    /// A mount would fail.
    Fail,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A short stable name, for programs.
    pub check: &'static str,
    pub severity: Severity,
    pub what: String,
    /// What to do; nothing to do when it is fine.
    pub mend: Option<String>,
}

impl Finding {
    pub fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self {
            check,
            severity: Severity::Ok,
            what: what.into(),
            mend: None,
        }
    }

    pub fn warn(check: &'static str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            check,
            severity: Severity::Warn,
            what: what.into(),
            mend: Some(mend.into()),
        }
    }

    pub fn fail(check: &'static str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            severity: Severity::Fail,
            ..Self::warn(check, what, mend)
        }
    }
}

/// Findings as people read them, with the sum in the last line.
pub fn text(findings: &[Finding]) -> String {
    let mut out = String::new();
    for finding in findings {
        let mark = match finding.severity {
            Severity::Ok => "ok  ",
            Severity::Warn => "WARN",
            Severity::Fail => "FAIL",
        };
        writeln!(out, "{mark}  {}: {}", finding.check, finding.what).expect("a string takes everything");
        if let Some(mend) = &finding.mend {
            writeln!(out, "      -> {mend}").expect("a string takes everything");
        }
    }
    let number = |severity| {
        findings
            .iter()
            .filter(|finding| finding.severity == severity)
            .count()
    };
    let sum = match (number(Severity::Fail), number(Severity::Warn)) {
        (0, 0) => "nothing stands against a mount".to_owned(),
        (0, warnings) => format!("a mount works here; {warnings} to look at"),
        (failures, _) => format!("a mount fails here; {failures} to mend"),
    };
    writeln!(out, "{sum}").expect("a string takes everything");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_trouble_comes_with_what_to_do() {
        let findings = [
            Finding::ok("fuse", "/dev/fuse is there"),
            Finding::fail("store", "no bucket", "create it"),
        ];
        assert_eq!(
            text(&findings),
            "ok    fuse: /dev/fuse is there\nFAIL  store: no bucket\n      -> create it\na mount fails here; 1 to mend\n"
        );
        assert!(text(&findings[..1]).ends_with("nothing stands against a mount\n"));
        assert!(Severity::Fail > Severity::Warn && Severity::Warn > Severity::Ok);
    }
}
