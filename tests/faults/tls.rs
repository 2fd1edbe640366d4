//! The port that speaks https: as good as the plain one, and nobody's silence or noise stops it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::http::{self, Answer, Pending};
use crate::readers::large_stream;
use crate::server::{self, PATIENCE, Server, long_stream};

/// A certificate for localhost that signs itself, and its key, as files.
struct Identity {
    cert: PathBuf,
    key: PathBuf,
    trusted: CertificateDer<'static>,
    folder: TempDir,
}

impl Identity {
    fn new() -> Self {
        let names = vec!["localhost".to_owned()];
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: String| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let (pem, secret) = (cert.pem(), signing_key.serialize_pem());
        let (cert_file, key) = (put("cert.pem", pem), put("key.pem", secret));
        Self { cert: cert_file, key, trusted: cert.der().clone(), folder }
    }

    fn flags(&self) -> [&str; 4] {
        let [cert, key] = [&self.cert, &self.key].map(|path| path.to_str().unwrap());
        ["--tls-cert", cert, "--tls-key", key]
    }

    /// A connection that trusts this certificate and no other.
    async fn connect(&self, server: &Server) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(self.trusted.clone()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let socket = TcpStream::connect(server.address).await.unwrap();
        let name = "localhost".try_into().unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, socket).await.expect("a TLS connection")
    }

    async fn send(&self, server: &Server, method: &str, path: &str, body: &str) -> Pending {
        let headers = [("content-type", "application/json")];
        let stream = self.connect(server).await;
        http::send_over(stream, method, path, &headers, body.as_bytes()).await
    }

    async fn get(&self, server: &Server, path: &str) -> Answer {
        self.send(server, "GET", path, "").await.answer().await
    }

    async fn stream(&self, server: &Server) -> Pending {
        let body = long_stream().to_string();
        let mut stream = self.send(server, "POST", "/v1/chat/completions", &body).await;
        stream.wait_for("\"content\"").await;
        stream
    }

    /// No sequence, no block, no panic.
    async fn is_well(&self, server: &Server) {
        let busy = async || {
            let mut sum = 0.0;
            for name in ["requests_running", "requests_waiting", "kv_blocks_used"] {
                sum += self.metric(server, &format!("hearth_{name}")).await;
            }
            sum
        };
        let start = Instant::now();
        while busy().await > 0.0 {
            assert!(start.elapsed() < PATIENCE, "something is still held");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(self.get(server, "/health").await.status, 200);
        assert!(!server.log().contains("panicked"), "{}", server.log());
    }

    async fn metric(&self, server: &Server, name: &str) -> f64 {
        let text = self.get(server, "/metrics").await.body;
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

/// Text comes piece by piece; who hangs up is noticed; SIGTERM lets a stream finish, whoever else
/// is connected.
#[tokio::test(flavor = "multi_thread")]
async fn https_streams_cancels_and_drains() {
    let identity = Identity::new();
    let mut server = Server::start(&identity.flags());
    let stream = identity.stream(&server).await;
    assert!(!stream.so_far().contains("[DONE]"), "it came in one piece");
    drop(stream);
    for _ in 0..500 {
        if identity.metric(&server, "hearth_cancelled_total").await == 1.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(identity.metric(&server, "hearth_cancelled_total").await, 1.0);
    identity.is_well(&server).await;
    let silent = http::send_raw(server.address, b"").await;
    let body = long_stream().to_string();
    let want = identity.send(&server, "POST", "/v1/chat/completions", &body).await.answer().await;
    let stream = identity.stream(&server).await;
    server.signal("-TERM");
    let answer = stream.answer().await;
    assert_eq!(answer.chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(server::text(&answer), server::text(&want));
    assert_eq!(server.wait().code(), Some(0));
    drop(silent);
}

/// Who reads nothing is hung up on here too.
#[tokio::test(flavor = "multi_thread")]
async fn https_does_not_wait_for_readers() {
    let identity = Identity::new();
    let flags = [&identity.flags()[..], &["--send-timeout-s", "2"]].concat();
    let server = Server::start(&flags);
    let connections = server.sockets();
    let body = large_stream().to_string();
    let unread = identity.send(&server, "POST", "/v1/chat/completions", &body).await;
    while identity.metric(&server, "hearth_requests_aside").await == 0.0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server.has_sockets(connections).await;
    for _ in 0..500 {
        if identity.metric(&server, "hearth_cancelled_total").await > 0.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(identity.metric(&server, "hearth_cancelled_total").await > 0.0);
    identity.is_well(&server).await;
    drop(unread);
}

/// Clients that say nothing, or half of a greeting, or noise, are only connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_greeting_stops_nobody_else() {
    let identity = Identity::new();
    let server = Server::start(&identity.flags());
    let mut open = Vec::new();
    for i in 0..150 {
        // The last is a record of TLS that never ends.
        let bytes: &[u8] = [&b""[..], b"\0\xff\xfe", b"\x16\x03\x01\x40\x00\x01"][i % 3];
        open.push(http::send_raw(server.address, bytes).await);
    }
    let answer = tokio::time::timeout(Duration::from_secs(20), identity.get(&server, "/health"));
    assert_eq!(answer.await.expect("nobody stands in the way").status, 200);
    // Noise is hung up on at once.
    http::send_raw(server.address, b"\0\0\0\0\0\0\0\0").await.closed().await;
    drop(open);
    identity.is_well(&server).await;
}

/// Who speaks plain HTTP to it is told, and nothing else happens.
#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_refused_with_a_word() {
    let identity = Identity::new();
    let server = Server::start(&identity.flags());
    let bodies = [("GET", "/health", ""), ("POST", "/v1/chat/completions", "{\"model\": 5}")];
    for (method, path, body) in bodies {
        let sent = http::send(server.address, method, path, &[], body.as_bytes()).await;
        let answer = sent.answer().await;
        let error = answer.error();
        let code = error["code"].as_str().unwrap();
        assert_eq!((answer.status, code), (400, "https_required"));
    }
    assert_eq!(identity.get(&server, "/health").await.status, 200);
}

/// A server that would not be what was asked for does not start, and says which file is to blame.
#[test]
fn wrong_files_are_refused_at_the_start() {
    let (mine, other) = (Identity::new(), Identity::new());
    let nothing = mine.folder.path().join("nothing.pem");
    let absent = mine.folder.path().join("absent.pem");
    fs::write(&nothing, "no PEM here\n").unwrap();
    let broken = mine.folder.path().join("broken.pem");
    let pem = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n";
    fs::write(&broken, pem).unwrap();
    let cases = [
        (&mine.cert, Some(&other.key), "--tls-key", "is not the key of the certificate in"),
        (&mine.cert, Some(&mine.cert), "--tls-key", "no private key"),
        (&mine.cert, Some(&absent), "--tls-key", "No such file"),
        (&mine.cert, Some(&nothing), "--tls-key", "no private key"),
        (&mine.key, Some(&mine.key), "--tls-cert", "no certificate"),
        (&absent, Some(&mine.key), "--tls-cert", "No such file"),
        (&nothing, Some(&mine.key), "--tls-cert", "no certificate"),
        (&broken, Some(&mine.key), "--tls-cert", "certificate"),
        (&mine.cert, None, "--tls-cert", "needs a --tls-key"),
    ];
    for (cert, key, flag, why) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
        command.args(["serve", "--port", "0", "--data-dir", "none", "--tls-cert"]).arg(cert);
        key.map(|key| command.arg("--tls-key").arg(key));
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{said}");
        let blamed = if flag == "--tls-key" { key } else { key.and(Some(cert)) };
        let named = blamed.is_none_or(|file| said.contains(file.to_str().unwrap()));
        assert!(named && said.contains(flag) && said.contains(why), "{why}: {said}");
        assert!(!said.contains("serving"), "it loaded a model first: {said}");
        assert!(output.stdout.is_empty(), "it listened");
    }
}
