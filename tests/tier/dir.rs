//! A directory as a bucket: what crashes, permissions and missing disks do.

use std::{fs, time::Duration};

use casmount::tier::{
    Body, Put, TierError,
    url::{ConnectOptions, connect},
};

use super::Fixture;

fn private_files(fixture: &Fixture) -> usize {
    fs::read_dir(fixture.path().join(".casmount/tmp")).map_or(0, Iterator::count)
}

#[tokio::test]
async fn no_temporary_file_stays() {
    let fixture = Fixture::dir().await;
    fixture.bucket.put_new("a", Body::raw("1")).await.unwrap();
    let refused = fixture.bucket.put_new("a", Body::raw("2")).await.unwrap();
    assert_eq!(refused, Put::Refused);
    assert_eq!(private_files(&fixture), 0);
}

#[tokio::test]
async fn what_a_crash_left_is_no_object_and_is_swept_when_it_is_old() {
    let fixture = Fixture::dir().await;
    let folder = fixture.path().join(".casmount/tmp");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("old"), "half").unwrap();
    fs::write(folder.join("young"), "half").unwrap();
    let two_days_ago = std::time::SystemTime::now() - Duration::from_secs(48 * 3600);
    let file = fs::File::options().write(true).open(folder.join("old")).unwrap();
    file.set_modified(two_days_ago).unwrap();
    assert!(fixture.bucket.list("", None).await.unwrap().objects.is_empty());
    let url = fixture.bucket.url().parse().unwrap();
    connect(&url, &ConnectOptions::default()).await.unwrap();
    assert!(folder.join("young").exists());
    assert!(!folder.join("old").exists());
}

#[tokio::test]
async fn looking_at_a_directory_leaves_nothing_in_it() {
    let fixture = Fixture::dir().await;
    assert!(fixture.bucket.get("a", None, 1).await.unwrap().is_none());
    fixture.bucket.list("", None).await.unwrap();
    fixture.bucket.delete("a").await.unwrap();
    assert_eq!(fs::read_dir(fixture.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn the_time_of_a_store_in_use_is_known_at_once() {
    let fixture = Fixture::dir().await;
    fixture.bucket.put_new("a", Body::raw("x")).await.unwrap();
    let url = fixture.bucket.url().parse().unwrap();
    let again = connect(&url, &ConnectOptions::default()).await.unwrap();
    // A clock that has seen nothing prints no bounds.
    let clock = format!("{:?}", again.clock());
    assert!(clock.contains("Some"), "{clock}");
    assert_eq!(private_files(&fixture), 0);
}

#[tokio::test]
async fn a_root_that_is_missing_is_no_empty_bucket() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let url = format!("file://{}", root.display()).parse().unwrap();
    let bucket = connect(&url, &ConnectOptions::default()).await.unwrap();
    let no_bucket = |error: &TierError| matches!(error, TierError::NoBucket { .. });
    assert!(no_bucket(&bucket.get("a", None, 1).await.unwrap_err()));
    assert!(no_bucket(&bucket.head("a").await.unwrap_err()));
    assert!(no_bucket(&bucket.list("", None).await.unwrap_err()));
    assert!(no_bucket(&bucket.delete("a").await.unwrap_err()));
    assert!(no_bucket(&bucket.put_new("a", Body::raw("x")).await.unwrap_err()));
    assert!(!root.exists());
}

#[tokio::test]
async fn a_root_that_was_swapped_is_not_taken_for_the_store() {
    let fixture = Fixture::dir().await;
    fixture.bucket.put_new("a", Body::raw("x")).await.unwrap();
    // As when a disk is no longer mounted: the directory below it shows.
    let aside = tempfile::tempdir().unwrap();
    fs::rename(fixture.path(), aside.path().join("store")).unwrap();
    fs::create_dir(fixture.path()).unwrap();
    let read = fixture.bucket.get("a", None, 1).await;
    assert!(matches!(read, Err(TierError::NoBucket { .. })), "{read:?}");
    let written = fixture.bucket.put_new("b", Body::raw("x")).await;
    assert!(matches!(written, Err(TierError::NoBucket { .. })), "{written:?}");
    assert_eq!(fs::read_dir(fixture.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn keys_do_not_lead_out_of_the_root() {
    let fixture = Fixture::dir().await;
    for key in ["../x", "a/../../x", "/x", "a//b", ".casmount/lock", "", "a\0b"] {
        let put = fixture.bucket.put_new(key, Body::raw("x")).await;
        assert!(matches!(put, Err(TierError::Malformed { .. })), "{key:?}");
        let listed = fixture.bucket.list(key, None).await.unwrap();
        assert!(listed.objects.is_empty(), "{key:?}");
    }
}

#[tokio::test]
async fn what_stands_in_the_way_is_named_by_its_path() {
    let fixture = Fixture::dir().await;
    fs::write(fixture.path().join(".casmount"), "in the way").unwrap();
    let error = fixture.bucket.put_new("a", Body::raw("x")).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(error.to_string().contains(".casmount/tmp"), "{error}");
}
