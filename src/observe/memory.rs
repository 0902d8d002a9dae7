//! How much memory this process takes.

/// Resident bytes, as `/proc/self/status` has them; 0 where it cannot be read.
pub fn resident_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/status").map_or(0, |text| parse_rss(&text))
}

fn parse_rss(text: &str) -> u64 {
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_kernel_is_understood() {
        assert_eq!(
            parse_rss("Name:\tx\nVmRSS:\t    1234 kB\nThreads: 1\n"),
            1234 * 1024
        );
        assert_eq!(parse_rss("Name:\tx\n"), 0);
        assert!(resident_bytes() > 100_000);
    }
}
