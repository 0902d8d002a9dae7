//! The `casmount` program; everything is in the library.

fn main() -> std::process::ExitCode {
    casmount::cli::run()
}
