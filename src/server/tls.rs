//! TLS: the certificate and the key, read once at the start, and the greeting of a connection.
//!
//! Deliberately absent: certificates of clients (keys say who asks), and reading the files again
//! while the server runs.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::listen::{Socket, impatient};
use crate::config::ConfigError;

/// What a port that speaks https shows and knows.
#[derive(Clone)]
pub struct Tls(Arc<ServerConfig>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

/// How a client begins.
pub(super) enum Greeting {
    Secret(Box<TlsStream<Socket>>),
    /// In plain HTTP, to a port that does not speak it. Nothing is read yet.
    Plain(TcpStream),
}

impl Tls {
    /// Reads a chain of certificates and the private key of the first, both PEM.
    ///
    /// # Errors
    /// A file cannot be read, has nothing of what it should have, or the key is not that of the
    /// certificate; the error names the flag and the file.
    pub fn open(cert: &Path, key: &Path) -> Result<Self, ConfigError> {
        let wrong = |option: &str, path: &Path, what: &dyn fmt::Display| ConfigError {
            option: option.to_owned(),
            what: format!("{}: {what}", path.display()),
        };
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(cert)
            .and_then(Iterator::collect)
            .map_err(|error| wrong("--tls-cert", cert, &why(&error, "certificate")))?;
        if chain.is_empty() {
            return Err(wrong("--tls-cert", cert, &"no certificate in it, in the form of PEM"));
        }
        let secret = PrivateKeyDer::from_pem_file(key)
            .map_err(|error| wrong("--tls-key", key, &why(&error, "private key")))?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|config| config.with_no_client_auth().with_single_cert(chain, secret));
        let mut config = config.map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                let what = format!("is not the key of the certificate in {}", cert.display());
                wrong("--tls-key", key, &what)
            }
            rustls::Error::InvalidCertificate(_) => wrong("--tls-cert", cert, &error),
            _ => wrong("--tls-key", key, &error),
        })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(Arc::new(config)))
    }

    /// Agrees with a client on its secrets. It may take for ever.
    pub(super) async fn greet(
        self,
        socket: TcpStream,
        send_timeout: Duration,
    ) -> io::Result<Greeting> {
        let mut first = [0];
        // The first byte of TLS is 22; that of HTTP is the letter of a method.
        if socket.peek(&mut first).await? == 1 && first[0].is_ascii_uppercase() {
            return Ok(Greeting::Plain(socket));
        }
        let stream = TlsAcceptor::from(self.0).accept(impatient(socket, send_timeout)).await?;
        Ok(Greeting::Secret(Box::new(stream)))
    }
}

/// What is wrong with a file of PEM.
fn why(error: &pem::Error, kind: &str) -> String {
    match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound => format!("no {kind} in it, in the form of PEM"),
        other => other.to_string(),
    }
}
