//! A status as people read it: aligned, sizes with units, trouble last.

use std::fmt::Write as _;

use super::{
    Status,
    status::{Catalog, Layer, State, Uses},
};
use crate::base::units::{format_moment, format_size};

/// How much of a catalog is in use.
fn of_catalog(catalog: &Catalog) -> String {
    let whole = match (catalog.names, catalog.parts) {
        (Some(names), Some(parts)) => format!("{} in {}", count(names, "name"), count(parts, "part")),
        _ => "nothing loaded yet".to_owned(),
    };
    format!(
        "of {} as of {}: {whole}; {} here, {} fetched, {} loaded",
        catalog.volume,
        format_moment(catalog.watermark_millis),
        catalog.kept_parts,
        count(catalog.fetched_parts, "part"),
        count(catalog.loaded_registers, "register"),
    )
}

/// What the store hears of what is used here; nothing where it does not want to.
fn of_uses(uses: &Uses) -> Option<String> {
    let moment = |millis: Option<u64>| millis.map_or_else(|| "not yet".to_owned(), format_moment);
    let mut said = Vec::new();
    if uses.expire_seconds.is_some() {
        said.push(match uses.told_until_millis {
            Some(until) => format!(
                "told {}, good until {}",
                moment(uses.told_millis),
                format_moment(until)
            ),
            None => "not told yet".to_owned(),
        });
    }
    if uses.lifetime_seconds.is_some() {
        said.push(format!(
            "kept young {} ({})",
            moment(uses.kept_young_millis),
            count(uses.kept_young_blobs, "blob")
        ));
    }
    if said.is_empty() {
        return None;
    }
    said.push(format!("{} waiting", count(uses.waiting, "name")));
    said.extend(uses.last_error.as_ref().map(|err| format!("last error: {err}")));
    Some(said.join("; "))
}

/// Renders a status as lines of text.
pub fn text(status: &Status) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        writeln!(out, "{name:<12}{value}").expect("a string takes everything");
    };
    let mode = [
        match status.state {
            State::Serving => "serving",
            State::Stopping => "stopping",
        },
        if status.read_only {
            "read-only"
        } else {
            "read-write"
        },
        if status.passthrough {
            "passthrough"
        } else {
            "no passthrough"
        },
    ];
    line("mount", status.mountpoint.clone());
    line("volume", format!("{} of {}", status.volume, status.store));
    if let Some(snapshot) = &status.snapshot {
        let as_of = format_moment(snapshot.as_of_millis);
        line("snapshot", format!("{}, as of {as_of}", snapshot.tag));
    }
    for layer in status.layers.iter().skip(1) {
        let text = match status.snapshot {
            // Of the same moment, and there is no log to read.
            Some(_) => layer.volume.clone(),
            None => below(layer),
        };
        line("over", text);
    }
    for preset in &status.presets {
        line(
            "preset",
            format!(
                "{} for {} ({})",
                preset.preset,
                preset.dir,
                origin(&preset.origin)
            ),
        );
    }
    line(
        "daemon",
        format!(
            "{}, up {}, {} of memory, pid {}, version {}",
            mode.join(", "),
            duration(status.uptime_seconds),
            format_size(status.memory_bytes),
            status.pid,
            status.version
        ),
    );
    line(
        "machine",
        format!("{} (store {})", status.machine, status.store_id),
    );
    line("cache", status.cache_dir.clone());
    if let Some(log) = &status.log_file {
        line("log", log.clone());
    }
    let cache = &status.cache;
    line(
        "resident",
        format!(
            "{} in {}, of at most {}",
            format_size(cache.resident_bytes),
            count(cache.resident_blobs, "blob"),
            format_size(cache.limit_bytes)
        ),
    );
    line(
        "disk",
        format!(
            "{} free, {} kept free",
            format_size(cache.disk_free_bytes),
            format_size(cache.min_free_bytes)
        ),
    );
    line(
        "dirty",
        format!(
            "{} in {}, {} to settle, {} being uploaded ({})",
            format_size(cache.dirty_bytes),
            count(cache.dirty_blobs, "blob"),
            count(status.files.settling, "file"),
            count(status.upload.uploading_blobs, "blob"),
            format_size(status.upload.uploading_bytes)
        ),
    );
    line(
        "uploaded",
        format!(
            "{} in {}, {}",
            format_size(status.upload.uploaded_bytes),
            count(status.upload.uploaded_blobs, "blob"),
            count(status.upload.retries, "retry")
        ),
    );
    line(
        "evicted",
        format!(
            "{} in {}",
            format_size(cache.evicted_bytes),
            count(cache.evicted_blobs, "blob")
        ),
    );
    line(
        "opens",
        format!(
            "{}, {} by the kernel alone, {} now, {} for writing",
            hit_rate(status.files.hits, status.files.misses),
            status.files.passthrough_opens,
            status.files.open,
            status.files.open_for_writing
        ),
    );
    line(
        "volume log",
        format!(
            "{} to publish, {} published, {} from others",
            count(status.publish.pending_changes, "change"),
            status.publish.published_changes,
            status.follow.changes
        ),
    );
    for catalog in &status.catalogs {
        line("catalog", of_catalog(catalog));
    }
    if let Some(uses) = of_uses(&status.uses) {
        line("uses", uses);
    }
    for tier in &status.tiers {
        let state = if tier.reachable {
            "reachable"
        } else {
            "NOT REACHABLE"
        };
        let clock = match tier.clock_offset_millis {
            0 => "clocks agree".to_owned(),
            offset => format!("its clock is {offset:+} ms from ours"),
        };
        line("tier", format!("{}, {state}, {clock}", tier.url));
    }
    for err in status
        .catalogs
        .iter()
        .filter_map(|catalog| catalog.last_error.as_ref())
    {
        line("CATALOG", err.clone());
    }
    if cache.quarantined_blobs > 0 {
        line(
            "QUARANTINED",
            format!(
                "{}: bytes differ from the digest, not uploaded; see the log",
                count(cache.quarantined_blobs, "blob")
            ),
        );
    }
    if status.files.lost > 0 {
        line(
            "LOST",
            format!(
                "{} are gone from the bucket; their names read as missing until they are created again",
                count(status.files.lost, "blob")
            ),
        );
    }
    if status.files.misnamed > 0 {
        line(
            "MISNAMED",
            format!(
                "{} not what the name promises, not shared; the last one {}",
                count(status.files.misnamed, "file"),
                status.files.last_misnamed.as_deref().unwrap_or("is in the log")
            ),
        );
    }
    if status.files.withheld > 0 {
        line(
            "withheld",
            format!(
                "{} of action-cache entries that name a missing blob, answered as misses",
                count(status.files.withheld, "lookup")
            ),
        );
    }
    line(
        "last error",
        status.last_error.clone().unwrap_or_else(|| "none".to_owned()),
    );
    out
}

/// Who chose a preset, in words.
fn origin(origin: &str) -> &str {
    match origin {
        "mount" => "said by this mount",
        "volume" => "said by the volume",
        other => other,
    }
}

/// A volume below the mounted one, and how much of it is seen.
fn below(layer: &Layer) -> String {
    let changes = count(layer.changes, "change");
    match layer.until_millis {
        None => format!("{}, live, {changes} read", layer.volume),
        Some(until) => {
            let moment = format_moment(until);
            format!("{} as of {moment}, {changes} read", layer.volume)
        }
    }
}

/// `1 blob`, `3 blobs`, `2 retries`.
pub fn count(number: u64, noun: &str) -> String {
    match (number, noun.strip_suffix('y')) {
        (1, _) => format!("1 {noun}"),
        (_, Some(stem)) => format!("{number} {stem}ies"),
        (_, None) => format!("{number} {noun}s"),
    }
}

/// `42 s`, `3 min 2 s`, `5 h 12 min`, `3 d 4 h`.
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

fn hit_rate(hits: u64, misses: u64) -> String {
    let all = hits + misses;
    if all == 0 {
        return "none yet".to_owned();
    }
    let percent = hits as f64 * 100.0 / all as f64;
    format!("{hits} hits, {misses} misses ({percent:.1} % hits)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::status::{Cache, Files, Tier};

    fn status() -> Status {
        Status {
            mountpoint: "/mnt/cache".into(),
            volume: "main".into(),
            store: "s3://b".into(),
            machine: "ab".into(),
            cache_dir: "/c".into(),
            uptime_seconds: 3725,
            cache: Cache {
                resident_bytes: 3 << 29,
                resident_blobs: 1,
                ..Cache::default()
            },
            files: Files {
                hits: 3,
                misses: 1,
                ..Files::default()
            },
            tiers: vec![Tier {
                url: "s3://b".into(),
                reachable: false,
                last_error: None,
                clock_offset_millis: -40,
            }],
            ..Status::default()
        }
    }

    #[test]
    fn values_stand_in_one_column() {
        let text = text(&status());
        for line in text.lines() {
            assert!(
                line.len() > 12 && line.as_bytes()[11] == b' ' && line.as_bytes()[12] != b' ',
                "{line:?}"
            );
        }
        assert!(
            text.contains("resident    1.5 GiB in 1 blob, of at most 0 B\n"),
            "{text}"
        );
        assert!(text.contains("75.0 % hits"), "{text}");
        assert!(text.contains("up 1 h 2 min"), "{text}");
    }

    #[test]
    fn trouble_is_shown_only_when_there_is_some() {
        let calm = text(&status());
        assert!(calm.contains("NOT REACHABLE"));
        assert!(!calm.contains("LOST") && !calm.contains("QUARANTINED"));
        let mut lost = status();
        lost.files.lost = 2;
        lost.last_error = Some("denied".into());
        assert!(text(&lost).contains("2 blobs are gone"));
        assert!(text(&lost).contains("last error  denied\n"));
    }

    #[test]
    fn the_volumes_below_are_shown_where_there_are_some() {
        let layer = |volume: &str, until_millis| Layer {
            volume: volume.into(),
            until_millis,
            changes: 1,
            ..Layer::default()
        };
        let mut fork = status();
        fork.layers = vec![layer("main", None)];
        assert!(!text(&fork).contains("over"));
        fork.layers.push(layer("base", None));
        fork.layers.push(layer("old", Some(1_767_225_600_000)));
        let text = text(&fork);
        assert!(
            text.contains("\nover        base, live, 1 change read\n"),
            "{text}"
        );
        assert!(
            text.contains("\nover        old as of 2026-01-01 00:00:00 UTC, 1 change read\n"),
            "{text}"
        );
    }

    #[test]
    fn what_the_store_hears_of_uses_is_shown_where_it_wants_to() {
        assert!(!text(&status()).contains("uses"));
        let mut told = status();
        told.uses = Uses {
            expire_seconds: Some(60),
            waiting: 2,
            ..Uses::default()
        };
        assert!(text(&told).contains("\nuses        not told yet; 2 names waiting\n"));
        told.uses = Uses {
            expire_seconds: Some(60),
            lifetime_seconds: Some(60),
            told_millis: Some(1_767_225_600_000),
            told_until_millis: Some(1_767_225_660_000),
            kept_young_millis: Some(1_767_225_600_000),
            kept_young_blobs: 1,
            last_error: Some("denied".into()),
            ..Uses::default()
        };
        let text = text(&told);
        assert!(
            text.contains(
                "\nuses        told 2026-01-01 00:00:00 UTC, good until 2026-01-01 00:01:00 UTC; kept young 2026-01-01 \
                 00:00:00 UTC (1 blob); 0 names waiting; last error: denied\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn nouns_follow_their_number() {
        assert_eq!(count(1, "retry"), "1 retry");
        assert_eq!(count(0, "retry"), "0 retries");
        assert_eq!(count(2, "file"), "2 files");
    }
}
