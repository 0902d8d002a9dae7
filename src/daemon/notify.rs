//! Tells systemd how the service is (`sd_notify(3)`): a datagram of
//! `NAME=value` lines to the socket that `NOTIFY_SOCKET` names.
//!
//! Without that variable nobody listens and nothing is sent. A failure to
//! send is not a failure of the mount: it is logged and that is all.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

/// The one who started this service, listening.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Notifier {
    /// Connects to what `NOTIFY_SOCKET` names; `None` without it.
    pub fn from_env(variable: Option<OsString>) -> Option<Self> {
        let name = variable.filter(|name| !name.is_empty())?;
        let made = parse_address(&name).and_then(|address| {
            Ok(Self {
                socket: UnixDatagram::unbound()?,
                address,
            })
        });
        made.inspect_err(|err| tracing::warn!(socket = ?name, %err, "cannot tell systemd anything"))
            .ok()
    }

    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}\n", one_line(status)));
    }

    pub fn stopping(&self, status: &str) {
        self.send(&format!("STOPPING=1\nSTATUS={}\n", one_line(status)));
    }

    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}\n", one_line(status)));
    }

    /// Asks for `more` time before the start or stop counts as failed.
    pub fn extend_timeout(&self, more: Duration) {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}\n", more.as_micros()));
    }

    pub fn watchdog(&self) {
        self.send("WATCHDOG=1\n");
    }

    fn send(&self, message: &str) {
        if let Err(err) = self.socket.send_to_addr(message.as_bytes(), &self.address) {
            tracing::warn!(%err, "cannot tell systemd {:?}", message.trim_end());
        }
    }
}

/// A path, or with a leading `@` a name in the abstract namespace (unix(7)).
fn parse_address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(name),
        [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

/// How often systemd wants to hear `WATCHDOG=1`: half of what it allows.
///
/// `pid` is who it wants to hear it from; not us means never.
pub fn watchdog_interval(usec: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    if pid.is_some_and(|pid| pid != std::process::id().to_string()) {
        return None;
    }
    let usec: u64 = usec?.parse().ok().filter(|usec| *usec > 0)?;
    Some(Duration::from_micros(usec) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut buffer = [0; 256];
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }

    #[test]
    fn systemd_hears_at_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::from_env(Some(path.into())).unwrap();
        notifier.ready("serving\n/mnt");
        assert_eq!(receive(&systemd), "READY=1\nSTATUS=serving /mnt\n");
        notifier.stopping("x");
        assert_eq!(receive(&systemd), "STOPPING=1\nSTATUS=x\n");
        notifier.extend_timeout(Duration::from_secs(2));
        assert_eq!(receive(&systemd), "EXTEND_TIMEOUT_USEC=2000000\n");
    }

    #[test]
    fn systemd_hears_at_an_abstract_name() {
        let name = format!("casmount-test-{}", std::process::id());
        let systemd = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notifier::from_env(Some(format!("@{name}").into()))
            .unwrap()
            .watchdog();
        assert_eq!(receive(&systemd), "WATCHDOG=1\n");
    }

    #[test]
    fn without_a_listener_nothing_happens() {
        assert!(Notifier::from_env(None).is_none());
        assert!(Notifier::from_env(Some("vsock:2".into())).is_none());
        Notifier::from_env(Some("/nonexistent/notify".into()))
            .unwrap()
            .ready("x");
    }

    #[test]
    fn the_watchdog_is_fed_twice_as_often_as_it_wants() {
        assert_eq!(
            watchdog_interval(Some("3000000"), None),
            Some(Duration::from_millis(1500))
        );
        let own = std::process::id().to_string();
        assert!(watchdog_interval(Some("3000000"), Some(&own)).is_some());
        assert_eq!(watchdog_interval(Some("3000000"), Some("1")), None);
        assert_eq!(watchdog_interval(None, None), None);
        assert_eq!(watchdog_interval(Some("0"), None), None);
    }
}
