//! What is agreed with the kernel when a mount begins.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use fuser::{InitFlags, KernelConfig};

/// Requests that the kernel may have under way in the background (readahead,
/// asynchronous reads, RELEASE). With fuser's default of 16, sixteen reads that wait for
/// the bucket would hold up every other.
const MAX_BACKGROUND: u16 = 1024;

/// Bytes that the kernel reads ahead of a sequential reader, and asks for at once.
const READAHEAD_BYTES: u32 = 1 << 20;

/// Whether the kernel asks before it lists a directory that it has listed before.
pub(super) fn must_open_dirs(config: &KernelConfig) -> bool {
    !config.capabilities().contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT)
}

/// Asks for what the mount wants; `passthrough` is cleared when it was asked for and the kernel does not offer it.
pub(super) fn agree(config: &mut KernelConfig, passthrough: &AtomicBool) {
    let wanted = InitFlags::FUSE_ASYNC_READ
        | InitFlags::FUSE_ATOMIC_O_TRUNC
        | InitFlags::FUSE_BIG_WRITES
        | InitFlags::FUSE_DO_READDIRPLUS
        | InitFlags::FUSE_READDIRPLUS_AUTO
        | InitFlags::FUSE_PARALLEL_DIROPS
        | InitFlags::FUSE_MAX_PAGES
        | InitFlags::FUSE_CACHE_SYMLINKS
        | InitFlags::FUSE_EXPORT_SUPPORT
        | InitFlags::FUSE_EXPLICIT_INVAL_DATA;
    // What an older kernel lacks costs speed, not correctness.
    let _ = config.add_capabilities(wanted & config.capabilities());
    if passthrough.load(Ordering::Relaxed) {
        let offered = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok();
        passthrough.store(offered, Ordering::Relaxed);
        if !offered {
            tracing::warn!(
                "this kernel has no FUSE passthrough (it came with Linux 6.9): the daemon serves reads itself"
            );
        }
    }
    let _ = config.set_max_background(MAX_BACKGROUND);
    let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
    let _ = config.set_max_readahead(READAHEAD_BYTES);
    let _ = config.set_max_write(READAHEAD_BYTES);
    let _ = config.set_time_granularity(Duration::from_nanos(1));
}
