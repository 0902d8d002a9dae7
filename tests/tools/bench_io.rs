//! The file operations of the benchmark, timed without an interpreter in the way.
//!
//! ```text
//! bench-io write FILE BYTES      writes FILE in pieces of 1 MiB, close included
//! bench-io read FILE             reads FILE from start to end, open included
//! bench-io create DIR COUNT      COUNT times: create, write 4 KiB, close, rename
//! bench-io fill FILE BYTES SEED  writes bytes that are unlike those of any other seed; not timed
//! bench-io check FILE SEED       reads what `fill` wrote and compares it; timed
//! ```
//!
//! Prints one JSON object with the seconds it took.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
    time::Instant,
};

const PIECE: usize = 1 << 20;
const FILE_BYTES: usize = 4096;

/// Bytes that neither compress nor repeat: `SplitMix64` from a seed.
fn fill_piece(piece: &mut [u8], state: &mut u64) {
    for word in piece.chunks_exact_mut(8) {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
}

/// Seeds that are far apart on the sequence of the generator.
fn start_of(seed: u64) -> u64 {
    seed.wrapping_mul(0xd134_2543_de82_ef95) ^ 0x5851_f42d_4c95_7f2d
}

fn write(path: &Path, bytes: u64) -> io::Result<f64> {
    let mut piece = vec![0; PIECE];
    fill_piece(&mut piece, &mut start_of(u64::from(std::process::id())));
    let start = Instant::now();
    let mut file = File::create(path)?;
    for n in 0..bytes / PIECE as u64 {
        // Unlike its neighbours, at no cost that would be measured.
        piece[..8].copy_from_slice(&n.to_le_bytes());
        file.write_all(&piece)?;
    }
    drop(file);
    Ok(start.elapsed().as_secs_f64())
}

fn read(path: &Path) -> io::Result<f64> {
    let mut piece = vec![0; PIECE];
    let start = Instant::now();
    let mut file = File::open(path)?;
    while file.read(&mut piece)? > 0 {}
    Ok(start.elapsed().as_secs_f64())
}

fn create(dir: &Path, count: u64) -> io::Result<f64> {
    let mut bytes = vec![0; FILE_BYTES];
    let mut state = start_of(u64::from(std::process::id()));
    fs::create_dir_all(dir)?;
    let names: Vec<_> = (0..count)
        .map(|n| (dir.join(format!("tmp-{n}")), dir.join(format!("file-{n}"))))
        .collect();
    let start = Instant::now();
    for (from, to) in &names {
        fill_piece(&mut bytes[..8], &mut state);
        let mut file = File::create(from)?;
        file.write_all(&bytes)?;
        drop(file);
        fs::rename(from, to)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

fn fill(path: &Path, bytes: u64, seed: u64) -> io::Result<f64> {
    let mut piece = vec![0; PIECE];
    let mut state = start_of(seed);
    let start = Instant::now();
    let mut file = File::create(path)?;
    for _ in 0..bytes / PIECE as u64 {
        fill_piece(&mut piece, &mut state);
        file.write_all(&piece)?;
    }
    drop(file);
    Ok(start.elapsed().as_secs_f64())
}

fn check(path: &Path, seed: u64) -> io::Result<f64> {
    let (mut piece, mut expected) = (vec![0; PIECE], vec![0; PIECE]);
    let mut state = start_of(seed);
    let start = Instant::now();
    let mut file = File::open(path)?;
    for _ in 0..file.metadata()?.len() / PIECE as u64 {
        file.read_exact(&mut piece)?;
        fill_piece(&mut expected, &mut state);
        if piece != expected {
            return Err(io::Error::other("other bytes than were written"));
        }
    }
    Ok(start.elapsed().as_secs_f64())
}

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().map_err(io::Error::other);
    let seconds = match args[..] {
        ["write", file, bytes] => write(Path::new(file), number(bytes)?)?,
        ["read", file] => read(Path::new(file))?,
        ["create", dir, count] => create(Path::new(dir), number(count)?)?,
        ["fill", file, bytes, seed] => fill(Path::new(file), number(bytes)?, number(seed)?)?,
        ["check", file, seed] => check(Path::new(file), number(seed)?)?,
        _ => {
            return Err(io::Error::other(
                "usage: bench-io write|read|create|fill|check PATH ...",
            ));
        }
    };
    println!("{{\"seconds\": {seconds:.9}}}");
    Ok(())
}
