//! Which forks use names of which volume.
//!
//! A function of the list of volumes. Each is looked at once, however many lie over one another.

use std::collections::HashMap;

use crate::{base::volume::VolumeName, namespace::volumes::Listed};

/// The live forks by the volume that lies lowest below each, in the order of `all`.
///
/// Those whose settings lead in a circle, or nowhere, lie over nothing.
pub fn by_lowest(all: &[Listed]) -> HashMap<&VolumeName, Vec<&Listed>> {
    let parents: HashMap<&VolumeName, &VolumeName> = all
        .iter()
        .filter_map(|listed| Some((&listed.volume, &listed.parent.as_ref()?.volume)))
        .collect();
    // None: not known yet, which is what a circle comes back to.
    let mut lowest: HashMap<&VolumeName, Option<&VolumeName>> = HashMap::with_capacity(all.len());
    let mut forks: HashMap<&VolumeName, Vec<&Listed>> = HashMap::new();
    for listed in all.iter().filter(|listed| listed.is_live()) {
        let mut way = Vec::new();
        let mut at = &listed.volume;
        let found = loop {
            if let Some(known) = lowest.get(at) {
                break *known;
            }
            let Some(below) = parents.get(at).copied() else {
                break Some(at);
            };
            lowest.insert(at, None);
            way.push(at);
            at = below;
        };
        for of in way {
            lowest.insert(of, found);
        }
        if let Some(found) = found.filter(|found| **found != listed.volume) {
            forks.entry(found).or_default().push(listed);
        }
    }
    forks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::volume::StackLayer;

    fn listed(volume: &str, parent: Option<&str>) -> Listed {
        Listed {
            volume: volume.parse().unwrap(),
            parent: parent.map(|parent| StackLayer::live(parent.parse().unwrap())),
            own_prefix: false,
            created_millis: None,
            deleted_millis: None,
            deletion_undecided: false,
            trouble: None,
        }
    }

    /// The names of the forks over a volume.
    fn over(all: &[Listed], volume: &str) -> Vec<String> {
        let volume: VolumeName = volume.parse().unwrap();
        let forks = by_lowest(all);
        let forks = forks.get(&volume).map_or(&[][..], Vec::as_slice);
        forks.iter().map(|listed| listed.volume.to_string()).collect()
    }

    #[test]
    fn forks_of_forks_count_for_the_lowest_volume() {
        let mut all = vec![
            listed("a", Some("b")),
            listed("b", Some("main")),
            listed("gone", Some("main")),
            listed("main", None),
            listed("of-gone", Some("gone")),
            listed("other", None),
            listed("over-other", Some("other")),
        ];
        all[2].deleted_millis = Some(7);
        assert_eq!(over(&all, "main"), ["a", "b", "of-gone"]);
        assert_eq!(over(&all, "other"), ["over-other"]);
        assert!(over(&all, "b").is_empty() && over(&all, "gone").is_empty());
        // Its deletion may be taken back.
        all[2].deletion_undecided = true;
        assert_eq!(over(&all, "main"), ["a", "b", "gone", "of-gone"]);
    }

    #[test]
    fn what_leads_in_a_circle_lies_over_nothing() {
        let all = [
            listed("a", Some("b")),
            listed("b", Some("c")),
            listed("c", Some("b")),
            listed("d", Some("d")),
            listed("e", Some("unknown")),
            listed("f", Some("a")),
            listed("main", None),
        ];
        for volume in ["a", "b", "c", "d", "main"] {
            assert!(over(&all, volume).is_empty(), "{volume}");
        }
        assert_eq!(over(&all, "unknown"), ["e"]);
    }

    #[test]
    fn a_long_way_down_is_gone_once() {
        let name = |number: usize| format!("v{number:05}");
        let of = |number: usize| listed(&name(number), (number > 0).then(|| name(number - 1)).as_deref());
        let all: Vec<Listed> = (0..50_000).map(of).collect();
        // Gone anew for each it would be more than a thousand million steps.
        assert_eq!(over(&all, &name(0)).len(), all.len() - 1);
    }
}
