//! Makes a volume of many names quickly, for the benchmark and by hand.

#[path = "../support/volume.rs"]
mod volume;

use std::process::ExitCode;

use casmount::{
    base::volume::VolumeName,
    tier::url::{self, ConnectOptions},
};
use clap::Parser;

use volume::Shape;

/// Make a volume of many names, without a log.
#[derive(Parser)]
#[command(
    name = "make-volume",
    after_help = "Example:
  make-volume --store file:///tmp/store --volume large --names 1000000"
)]
struct Arguments {
    #[arg(long)]
    store: String,
    #[arg(long, default_value = "main")]
    volume: VolumeName,
    /// Files; directories come on top, one for about 250 of them.
    #[arg(long)]
    names: u64,
    /// Files of a directory.
    #[arg(long, default_value_t = 250)]
    per_dir: u64,
    /// Directories of a directory.
    #[arg(long, default_value_t = 64)]
    fan_out: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be started");
    match runtime.block_on(make(&arguments)) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(err) => {
            eprintln!("make-volume: {err}");
            ExitCode::FAILURE
        }
    }
}

async fn make(arguments: &Arguments) -> Result<String, Box<dyn std::error::Error>> {
    let bucket = url::connect(&arguments.store.parse()?, &ConnectOptions::default()).await?;
    let shape = Shape {
        names: arguments.names,
        per_dir: arguments.per_dir,
        fan_out: arguments.fan_out,
    };
    volume::make(&bucket, arguments.volume.as_str(), shape, Vec::new()).await
}
