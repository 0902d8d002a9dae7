//! The daemon's end of the control socket.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    task::{JoinHandle, JoinSet},
};

use super::protocol::{MAX_REQUEST_BYTES, Reply, Request};

/// A client that asks for nothing does not keep its place for ever.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// Clients served at once; a loop of `status` in a shell needs one.
const MOST_CLIENTS: usize = 64;

/// Answers a request: sends any number of progress replies, then one last reply.
///
/// Called inside the runtime; must not block.
pub type Answerer = Arc<dyn Fn(Request, mpsc::Sender<Reply>) + Send + Sync>;

/// A socket that is being served.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    retire: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// Starts to serve at `path`, inside a runtime.
///
/// The caller owns the mountpoint by now, so a socket that is there is of a
/// daemon that died, and is replaced.
pub fn serve(path: PathBuf, answer: Answerer) -> io::Result<ControlServer> {
    let listener = bind(&path)?;
    let (retire, retired) = oneshot::channel();
    let task = tokio::spawn(accept(listener, answer, retired));
    Ok(ControlServer {
        path,
        retire: Some(retire),
        task,
    })
}

/// Accepts clients until told to stop, then waits for those that are there.
async fn accept(listener: UnixListener, answer: Answerer, mut retired: oneshot::Receiver<()>) {
    let mut clients = JoinSet::new();
    loop {
        while clients.len() >= MOST_CLIENTS {
            clients.join_next().await;
        }
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut retired => break,
        };
        match accepted {
            Ok((stream, _)) => {
                let answer = Arc::clone(&answer);
                clients.spawn(async move {
                    if let Err(err) = serve_client(stream, answer).await {
                        tracing::debug!(%err, "a client of the control socket went away");
                    }
                });
            }
            Err(err) => {
                // Out of descriptors, most likely: others give some back.
                tracing::warn!(%err, "cannot accept a client of the control socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        while clients.try_join_next().is_some() {}
    }
    drop(listener);
    while clients.join_next().await.is_some() {}
}

/// Binds beside the final name and renames, so that the socket is never there
/// with permissions that are too wide, and a stale one is replaced at once.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let temp = path.with_extension(format!("{}.new", std::process::id()));
    crate::base::durable::remove_if_there(&temp)?;
    let listener = UnixListener::bind(&temp)?;
    fs::set_permissions(&temp, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temp, path)?;
    Ok(listener)
}

async fn serve_client(stream: UnixStream, answer: Answerer) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(MAX_REQUEST_BYTES as u64));
    tokio::time::timeout(REQUEST_WITHIN, reader.read_line(&mut line)).await??;
    let request = match Request::from_line(&line) {
        Ok(request) => request,
        Err(message) => {
            return writer
                .write_all(Reply::Error { message }.to_line().as_bytes())
                .await;
        }
    };
    tracing::debug!(?request, "asked");
    let (replies, mut received) = mpsc::channel(4);
    answer(request, replies);
    while let Some(reply) = received.recv().await {
        writer.write_all(reply.to_line().as_bytes()).await?;
        if reply.is_last() {
            return writer.shutdown().await;
        }
    }
    // The daemon ends before it has an answer; the client sees the closed connection.
    Ok(())
}

impl ControlServer {
    /// Takes no more clients and removes the socket; those that are there get their replies.
    ///
    /// To be called before the last words to whoever asked for the unmount: a
    /// next daemon may then put its own socket at the same place.
    pub fn retire(&mut self) {
        if let Some(retire) = self.retire.take() {
            if let Err(err) = crate::base::durable::remove_if_there(&self.path) {
                tracing::warn!(%err, path = %self.path.display(), "cannot remove the control socket");
            }
            // The task ended already if nobody hears this.
            let _ = retire.send(());
        }
    }

    /// Waits until every client has its reply, for at most `within`.
    pub async fn finish(mut self, within: Duration) {
        self.retire();
        if tokio::time::timeout(within, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}
