//! The address of the engine that a worker connects to.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

/// How long the engine has to accept a connection before it counts as not listening.
const ENGINE_TIMEOUT: Duration = Duration::from_millis(250);

/// Where the engine listens.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Engine {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Engine {
    /// Its URL.
    pub fn url(&self) -> String {
        if self.host.contains(':') {
            format!("ws://[{}]:{}", self.host, self.port)
        } else {
            format!("ws://{}:{}", self.host, self.port)
        }
    }

    /// The engine at `url`, as in `ws://127.0.0.1:49134`; `None` where that is nothing of the kind.
    pub fn of_url(url: &str) -> Option<Self> {
        let authority = url.trim().strip_prefix("ws://")?;
        let authority = authority.split(['/', '?', '#']).next()?;
        let (host, port) = authority.rsplit_once(':')?;
        let host = host
            .strip_prefix('[')
            .map_or(Some(host), |v6| v6.strip_suffix(']'))?;
        (!host.is_empty())
            .then(|| port.parse().ok())?
            .map(|port| Self {
                host: host.to_owned(),
                port,
            })
    }

    /// Whether a process accepts connections there within a quarter of a second.
    pub fn listens(&self) -> bool {
        let Ok(addresses) = (self.host.as_str(), self.port).to_socket_addrs() else {
            return false;
        };
        addresses
            .into_iter()
            .any(|address| TcpStream::connect_timeout(&address, ENGINE_TIMEOUT).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_named_by_urls() {
        for (url, same) in [
            ("ws://127.0.0.1:49134", Some("ws://127.0.0.1:49134")),
            ("ws://localhost:1/", Some("ws://localhost:1")),
            ("ws://[::1]:2/x?y", Some("ws://[::1]:2")),
            ("ws://:2", None),
            ("ws://[::1:2", None),
            ("ws://host", None),
            ("ws://host:port", None),
            ("http://host:1", None),
            ("", None),
        ] {
            let engine = Engine::of_url(url).map(|engine| engine.url());
            assert_eq!(engine.as_deref(), same, "{url}");
        }
    }
}
