//! Programs of others that tests run on a mount: where they are, and what they may take.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use super::wait;

/// What a program may take that works on a mount while other tests do, too.
pub const LIMIT: Duration = Duration::from_secs(400);

/// Finds a program in `target/tools`, where `scripts/test` puts what no package brings, or in `PATH`.
pub fn find(name: &str) -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = [tools].into_iter().chain(std::env::split_paths(&path));
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Ends a test that needs programs which are not here, and says so; else gives their paths.
#[macro_export]
macro_rules! need {
    ($($name:expr),+) => {
        [$(match $crate::support::programs::find($name) {
            Some(program) => program,
            None => skip!("there is no {}; scripts/test installs it", $name),
        }),+]
    };
}

/// A program whose settings are not the developer's, and which asks nobody.
pub fn command(program: impl AsRef<Path>, home: &Path) -> Command {
    let mut command = Command::new(program.as_ref());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["GIT_", "XDG_", "RSYNC_", "TAR_", "MAKE", "MFLAGS"]
            .iter()
            .any(|prefix| text.starts_with(prefix))
        {
            command.env_remove(&name);
        }
    }
    command.env("HOME", home).env("LC_ALL", "C");
    command
}

/// Runs a program in a directory to its end, which must be a good one; returns what it wrote.
#[track_caller]
pub fn run(program: impl AsRef<Path>, dir: &Path, args: &[&str]) -> String {
    let mut command = command(program, dir);
    wait::run_ok(command.args(args).current_dir(dir), LIMIT)
}
