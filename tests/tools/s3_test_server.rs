//! Runs the S3 server of the tests by hand.

#[path = "../s3server/mod.rs"]
mod s3server;

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::Parser;

use s3server::{Faults, ServerOptions, TestServer};

/// A small S3 server for tests, with faults on demand. Do not keep anything in it.
#[derive(Parser)]
#[command(
    name = "s3-test-server",
    after_help = "Example:
  s3-test-server --port 9000 --bucket demo &
  eval \"$(s3-test-server --print-env --port 9000)\"
  casmount mount --store s3://demo ./mnt
  curl -d '{\"slow_down\":0.2,\"seed\":7}' http://127.0.0.1:9000/_admin/faults
  curl http://127.0.0.1:9000/_admin/counts

The first line of the output is the URL to reach it. Faults, by their names in JSON: seed, only,
error_500, slow_down, conflict, reset, stall, wrong_bytes, lost_reply (shares from 0 to 1);
latency_ms, down, forbidden, missing_is_403, ignore_conditions, ignore_ranges, date_skew_secs."
)]
struct Arguments {
    /// Port on the loopback address; 0 lets the kernel choose.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Name of the only bucket.
    #[arg(long, default_value = "casmount-test")]
    bucket: String,
    /// Keep bodies in files of this directory instead of in memory; gone at the end all the same.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Milliseconds added to every reply.
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// Faults to begin with, as JSON.
    #[arg(long, value_parser = parse_faults)]
    faults: Option<Faults>,
    #[arg(long, default_value = "test-access-key")]
    access_key: String,
    #[arg(long, default_value = "test-secret-key")]
    secret_key: String,
    /// Print the variables that a client needs, for `eval`, and end.
    #[arg(long)]
    print_env: bool,
}

fn parse_faults(text: &str) -> Result<Faults, String> {
    serde_json::from_str(text).map_err(|err| err.to_string())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.print_env {
        println!("export AWS_ENDPOINT_URL=http://127.0.0.1:{}", arguments.port);
        println!("export AWS_ACCESS_KEY_ID={}", arguments.access_key);
        println!("export AWS_SECRET_ACCESS_KEY={}", arguments.secret_key);
        println!("export AWS_REGION=us-east-1");
        return ExitCode::SUCCESS;
    }
    let mut faults = arguments.faults.unwrap_or_default();
    faults.latency_ms = faults.latency_ms.max(arguments.latency_ms);
    let server = TestServer::start(ServerOptions {
        port: arguments.port,
        bucket: arguments.bucket,
        dir: arguments.dir,
        access_key: arguments.access_key,
        secret_key: arguments.secret_key,
        restricted: Vec::new(),
        faults,
    });
    println!("{}", server.endpoint());
    if std::io::stdout().flush().is_err() {
        // Whoever started it is gone already.
        return ExitCode::FAILURE;
    }
    wait_for_the_end();
    ExitCode::SUCCESS
}

/// Waits for SIGINT or SIGTERM.
fn wait_for_the_end() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be started");
    runtime.block_on(async {
        let kind = tokio::signal::unix::SignalKind::terminate();
        let mut terminate = tokio::signal::unix::signal(kind).expect("SIGTERM can be caught");
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
    });
}
