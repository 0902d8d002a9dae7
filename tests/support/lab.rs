//! Several machines and one store, of both kinds: a directory, and S3 over HTTP.
//!
//! Included by test programs that also have the S3 server of the tests as `crate::s3server`.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use casmount::{
    store::pack,
    tier::{
        SharedBucket,
        url::{self, AccessKey, ConnectOptions},
    },
};

use crate::{
    s3server::{Faults, RestrictedKey, ServerOptions, TestServer},
    support::{
        machine::{Machine, MachineSpec},
        tempdir::TestDir,
        tree,
    },
};

/// The kinds of store that every scenario runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    File,
    S3,
}

/// Makes one test on each kind of store out of functions that take a [`StoreKind`].
#[macro_export]
macro_rules! on_both_stores {
    ($($name:ident),+ $(,)?) => {
        mod on_file { $(#[test] fn $name() { super::$name($crate::lab::StoreKind::File) })+ }
        mod on_s3 { $(#[test] fn $name() { super::$name($crate::lab::StoreKind::S3) })+ }
    };
}

enum Store {
    File(PathBuf),
    S3(Box<TestServer>),
}

/// A place for a scenario: a directory, a store, and machines as they are made.
pub struct Lab {
    store: Store,
    // Dropped last: everything is below it.
    dir: TestDir,
}

/// The secret of every key that is held to a policy.
pub const RESTRICTED_SECRET: &str = "secret";

/// A machine with the credentials of a key that is held to a policy.
pub fn as_user(spec: MachineSpec, id: &str) -> MachineSpec {
    spec.env("AWS_ACCESS_KEY_ID", id)
        .env("AWS_SECRET_ACCESS_KEY", RESTRICTED_SECRET)
}

/// An object as it is stored.
pub struct StoredObject {
    pub key: String,
    pub bytes: Vec<u8>,
}

impl Lab {
    pub fn new(kind: StoreKind) -> Self {
        Self::with_keys(kind, Vec::new())
    }

    /// A lab whose S3 server holds `trusted` machines and those of pull requests (`pr`) to the policies that are shipped.
    pub fn guarded() -> Self {
        let shipped = |name: &str| {
            let path = format!("{}/packaging/iam/{name}", env!("CARGO_MANIFEST_DIR"));
            let policy = fs::read_to_string(path).expect("it is shipped");
            policy.replace("my-bucket", "casmount-test")
        };
        let key = |id: &str, policy: &str| RestrictedKey {
            access_key: id.to_owned(),
            secret_key: RESTRICTED_SECRET.to_owned(),
            policy: shipped(policy),
        };
        let keys = [
            ("trusted", "trusted-writer.json"),
            ("pr", "pull-request-writer.json"),
        ];
        Self::with_keys(StoreKind::S3, keys.map(|(id, policy)| key(id, policy)).into())
    }

    /// A lab whose S3 server knows more access keys, each held to a policy.
    pub fn with_keys(kind: StoreKind, restricted: Vec<RestrictedKey>) -> Self {
        let dir = TestDir::new();
        let store = match kind {
            StoreKind::File => {
                let path = dir.path().join("store");
                fs::create_dir(&path).expect("a directory can be made");
                Store::File(path)
            }
            StoreKind::S3 => {
                let bodies = dir.path().join("bodies");
                fs::create_dir(&bodies).expect("a directory can be made");
                // Bodies in files: a test of gigabytes must not need their size in memory.
                Store::S3(Box::new(TestServer::start(ServerOptions {
                    dir: Some(bodies),
                    restricted,
                    ..ServerOptions::default()
                })))
            }
        };
        Self { store, dir }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn url(&self) -> String {
        match &self.store {
            Store::File(path) => format!("file://{}", path.display()),
            Store::S3(server) => server.url(),
        }
    }

    /// The S3 server; only for scenarios of S3 alone.
    pub fn server(&self) -> &TestServer {
        match &self.store {
            Store::S3(server) => server,
            Store::File(_) => panic!("this lab has a directory as its store"),
        }
    }

    /// Describes a machine on this lab's store.
    pub fn spec(&self, name: &str) -> MachineSpec {
        self.spec_at(name, &self.url())
    }

    /// Describes a machine on another store that the same server has, or does not have.
    pub fn spec_at(&self, name: &str, url: &str) -> MachineSpec {
        let mut spec = MachineSpec::new(name, self.dir(), url);
        if let Store::S3(server) = &self.store {
            for (variable, value) in server.env() {
                spec = spec.env(variable, value);
            }
        }
        spec
    }

    /// Starts a machine with nothing special.
    #[track_caller]
    pub fn machine(&self, name: &str) -> Machine {
        self.spec(name).start()
    }

    /// Connects to the store as the program does, with an access key of the server if it is one.
    pub async fn connect(&self, id: &str, secret: &str) -> SharedBucket {
        let options = match &self.store {
            Store::S3(server) => ConnectOptions {
                endpoint_url: Some(server.endpoint()),
                region: Some("us-east-1".to_owned()),
                access_key: Some(AccessKey {
                    id: id.to_owned(),
                    secret: secret.to_owned(),
                }),
                ..ConnectOptions::default()
            },
            Store::File(_) => ConnectOptions::default(),
        };
        let url = self.url().parse().expect("our own URL");
        url::connect(&url, &options)
            .await
            .expect("the store can be reached")
    }

    /// Does something with the store behind the machines' backs.
    pub fn with_bucket<T>(&self, act: impl AsyncFnOnce(SharedBucket) -> T) -> T {
        let (id, secret) = match &self.store {
            Store::S3(server) => (server.access_key(), server.secret_key()),
            Store::File(_) => ("", ""),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be started");
        runtime.block_on(async { act(self.connect(id, secret).await).await })
    }

    /// Every object of the store with its bytes.
    pub fn objects(&self) -> Vec<StoredObject> {
        match &self.store {
            Store::S3(server) => {
                let stored = server.objects().into_iter();
                let read = stored.filter_map(|object| {
                    let bytes = server.object(&object.key)?;
                    Some(StoredObject {
                        key: object.key,
                        bytes,
                    })
                });
                read.collect()
            }
            Store::File(root) => {
                let mut objects = Vec::new();
                let mut pending = vec![root.clone()];
                while let Some(dir) = pending.pop() {
                    for entry in fs::read_dir(&dir).expect("the store can be listed") {
                        let path = entry.expect("the store can be listed").path();
                        let key = path
                            .strip_prefix(root)
                            .expect("it is below")
                            .display()
                            .to_string();
                        if key.starts_with('.') {
                            continue;
                        }
                        if path.is_dir() {
                            pending.push(path);
                        } else {
                            let bytes = match fs::read(&path) {
                                // Of a write that is under way.
                                Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
                                read => read.expect("the store can be read"),
                            };
                            objects.push(StoredObject { key, bytes });
                        }
                    }
                }
                objects
            }
        }
    }

    /// Puts other bytes under a key behind everyone's back; `None` removes the object.
    pub fn tamper(&self, key: &str, bytes: Option<Vec<u8>>) {
        match (&self.store, bytes) {
            (Store::S3(server), bytes) => server.tamper(key, bytes),
            (Store::File(root), Some(bytes)) => {
                let path = root.join(key);
                // Another file: a hard link of it elsewhere stays as it is.
                let _ = fs::remove_file(&path);
                fs::create_dir_all(path.parent().expect("a key has a folder")).expect("it can be made");
                fs::write(path, bytes).expect("the store can be written");
            }
            (Store::File(root), None) => fs::remove_file(root.join(key)).expect("the object is there"),
        }
    }

    /// Takes the store away, and gives it back.
    pub fn set_down(&self, down: bool) {
        match &self.store {
            Store::S3(server) => server.set_faults(Faults {
                down,
                ..Faults::default()
            }),
            Store::File(root) => {
                let away = root.with_extension("away");
                let (from, to) = if down { (root, &away) } else { (&away, root) };
                fs::rename(from, to).expect("a directory can be renamed");
            }
        }
    }

    /// Makes blobs and packs older than they are.
    pub fn age_blobs(&self, by: Duration) {
        for prefix in ["blobs/", "packs/"] {
            match &self.store {
                Store::S3(server) => server.age(prefix, by),
                Store::File(root) => {
                    for (path, age) in aged_files(&root.join(prefix)) {
                        let file = fs::File::options().write(true).open(path);
                        let older = SystemTime::now() - age - by;
                        file.and_then(|file| file.set_modified(older))
                            .expect("files can be made older");
                    }
                }
            }
        }
    }

    /// Does what the bucket's lifecycle rule does: removes blobs and packs that were written so long ago.
    pub fn expire_blobs(&self, lifetime: Duration) {
        for prefix in ["blobs/", "packs/"] {
            match &self.store {
                Store::S3(server) => server.expire(prefix, lifetime),
                Store::File(root) => {
                    for (path, age) in aged_files(&root.join(prefix)) {
                        if age >= lifetime {
                            fs::remove_file(path).expect("a file can be removed");
                        }
                    }
                }
            }
        }
    }

    /// Asserts that every blob of the store, in a pack or by itself, has the bytes that its name promises.
    ///
    /// Returns how many there are, so that a caller can demand some.
    #[track_caller]
    pub fn assert_blobs_match_their_names(&self) -> usize {
        let mut count = 0;
        for object in self.objects() {
            let name = object.key.rsplit('/').next().expect("a key has parts");
            if object.key.starts_with("blobs/sha256/") {
                count += 1;
                let is_raw = tree::hex(&tree::digest(&object.bytes)) == name;
                assert!(
                    is_raw || is_frame_of(&object.bytes, name),
                    "the bytes of {}",
                    object.key
                );
            }
            if object.key.starts_with("packs/") {
                let pack = name.parse().expect("a pack is named by a digest");
                let members = pack::read_members(&object.bytes, &pack)
                    .unwrap_or_else(|| panic!("{} is not the pack of its name", object.key));
                count += members.len();
                for (chunk, place) in members {
                    let range = place.range();
                    let stored = &object.bytes[range.start as usize..range.end as usize];
                    let name = chunk.digest.to_string();
                    let is_right = if place.zstd {
                        is_frame_of(stored, &name)
                    } else {
                        tree::hex(&tree::digest(stored)) == name
                    };
                    assert!(is_right, "the bytes of {name} in {}", object.key);
                }
            }
        }
        count
    }

    /// The keys of all blobs of the store.
    pub fn blob_keys(&self) -> Vec<String> {
        let keys = self.objects().into_iter().map(|object| object.key);
        keys.filter(|key| key.starts_with("blobs/")).collect()
    }
}

/// The files below a directory with their ages.
fn aged_files(root: &Path) -> Vec<(PathBuf, Duration)> {
    let mut files = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten() {
            let path = entry.expect("the store can be listed").path();
            let Ok(meta) = fs::metadata(&path) else { continue };
            if meta.is_dir() {
                pending.push(path);
            } else {
                let modified = meta.modified().expect("files have times");
                files.push((
                    path,
                    SystemTime::now().duration_since(modified).unwrap_or_default(),
                ));
            }
        }
    }
    files
}

fn is_frame_of(packed: &[u8], name: &str) -> bool {
    let unpacked = zstd::decode_all(packed).unwrap_or_default();
    tree::hex(&tree::digest(&unpacked)) == name
}
