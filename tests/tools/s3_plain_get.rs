//! A plain parallel ranged GET: what reading a large file from S3 costs without casmount.
//!
//! ```text
//! s3-plain-get put BUCKET KEY FILE
//! s3-plain-get get BUCKET KEY FILE [--parallel N] [--part-mib N]
//! ```
//!
//! The benchmark compares a cold read through the mount with `get`, so `get` does what nobody can
//! do without: the same SDK, many ranges at once, each byte hashed once and written to the disk.
//! It prints one JSON object; the time starts after the client is made and its connection is warm.
//! Endpoint, region and credentials come from the SDK's usual variables.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use aws_sdk_s3::{Client, primitives::ByteStream};
use clap::{Parser, Subcommand};
use sha2::{Digest, Sha256};
use tokio::{sync::Semaphore, task::JoinSet};

#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stores a file as one object.
    Put {
        bucket: String,
        key: String,
        file: PathBuf,
    },
    /// Reads an object into a file, in parallel ranges.
    Get {
        bucket: String,
        key: String,
        file: PathBuf,
        #[arg(long, default_value_t = 16)]
        parallel: usize,
        #[arg(long, default_value_t = 4)]
        part_mib: u64,
    },
}

async fn client() -> Client {
    let shared = aws_config::load_defaults(aws_config::BehaviorVersion::latest()).await;
    let config = aws_sdk_s3::config::Builder::from(&shared)
        .force_path_style(true)
        .build();
    Client::from_conf(config)
}

async fn put(client: &Client, bucket: &str, key: &str, file: &Path) -> io::Result<()> {
    let body = ByteStream::from_path(file).await.map_err(io::Error::other)?;
    let put = client.put_object().bucket(bucket).key(key).body(body);
    put.send().await.map_err(io::Error::other)?;
    Ok(())
}

/// Fetches one range, hashes it, and writes it to its place.
async fn get_range(
    client: Client,
    bucket: Arc<str>,
    key: Arc<str>,
    range: std::ops::Range<u64>,
    file: Arc<File>,
) -> io::Result<[u8; 32]> {
    let asked = format!("bytes={}-{}", range.start, range.end - 1);
    let get = client.get_object().bucket(&*bucket).key(&*key).range(asked);
    let reply = get.send().await.map_err(io::Error::other)?;
    let bytes = reply.body.collect().await.map_err(io::Error::other)?.into_bytes();
    if bytes.len() as u64 != range.end - range.start {
        return Err(io::Error::other("the server sent another range"));
    }
    let stored = tokio::task::spawn_blocking(move || {
        let digest = Sha256::digest(&bytes).into();
        file.write_all_at(&bytes, range.start)?;
        Ok(digest)
    });
    stored.await.map_err(io::Error::other)?
}

async fn get(
    client: &Client,
    bucket: &str,
    key: &str,
    file: &Path,
    parallel: usize,
    part_bytes: u64,
) -> io::Result<()> {
    let head = client.head_object().bucket(bucket).key(key);
    let size = head
        .send()
        .await
        .map_err(io::Error::other)?
        .content_length()
        .unwrap_or_default() as u64;
    let start = Instant::now();
    let file = Arc::new(File::create(file)?);
    file.set_len(size)?;
    let slots = Arc::new(Semaphore::new(parallel));
    let (bucket, key): (Arc<str>, Arc<str>) = (bucket.into(), key.into());
    let mut parts = JoinSet::new();
    for from in (0..size).step_by(part_bytes as usize) {
        let range = from..size.min(from + part_bytes);
        let slot = Arc::clone(&slots)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let part = get_range(
            client.clone(),
            Arc::clone(&bucket),
            Arc::clone(&key),
            range,
            Arc::clone(&file),
        );
        parts.spawn(async move {
            let digest = part.await;
            drop(slot);
            digest
        });
    }
    let mut count = 0;
    while let Some(part) = parts.join_next().await {
        part.map_err(io::Error::other)??;
        count += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{}",
        serde_json::json!({ "bytes": size, "parts": count, "seconds": seconds })
    );
    Ok(())
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let args = Args::parse();
    let client = client().await;
    match args.command {
        Command::Put { bucket, key, file } => put(&client, &bucket, &key, &file).await,
        Command::Get {
            bucket,
            key,
            file,
            parallel,
            part_mib,
        } => get(&client, &bucket, &key, &file, parallel, part_mib << 20).await,
    }
}
