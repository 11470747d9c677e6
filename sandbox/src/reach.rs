//! The guest's reach in the network.
//!
//! A microVM has no network of its own: its connections are made by the process that runs it, on
//! the host. So `localhost` of the guest would be the host's, with every service that trusts
//! others on those networks.
//!
//! - Outside, everything may be reached. That includes this machine's other addresses, and with
//!   them every service that listens on all of them, as neighbours on a network reach it.
//! - Of the loopback, the ports that are allowed, the engine's, the name servers that the host
//!   uses, and its proxies. The guest's kernel keeps datagrams for its own `localhost` to itself,
//!   so that a name server there has another address inside.
//! - A worker listens on the loopback: its ports are for its developer alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::HostSettings;

const DNS: u16 = 53;
/// The first address, inside, of a name server on the host's loopback. Both are of blocks that
/// reserved for documentation (RFC 5737, RFC 3849).
const NAME_SERVERS: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(192, 0, 2, 53),
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 53),
);
/// Most name servers that are looked at; a libc takes three.
const MAX_NAME_SERVERS: usize = 8;

/// The reachable addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// Ports of the loopback.
    pub ports: Vec<u16>,
    /// The whole loopback.
    pub loopback: bool,
    /// Name servers on the loopback, by their addresses inside.
    name_servers: Vec<(IpAddr, IpAddr)>,
}

impl Reach {
    /// The ports of the loopback, or all of it.
    pub fn of_loopback(ports: impl IntoIterator<Item = u16>, all: bool) -> Self {
        Self {
            ports: ports.into_iter().collect(),
            loopback: all,
            name_servers: Vec::new(),
        }
    }

    /// Adds what the host's own settings lead to: name servers and proxies on its loopback.
    #[must_use]
    pub fn with_settings_of(mut self, host: &HostSettings) -> Self {
        let lines = host.resolv_conf.iter().flat_map(|text| text.lines());
        let servers = lines.filter_map(name_server).take(MAX_NAME_SERVERS);
        for (number, server) in (0..).zip(servers.filter(|server| is_local(*server))) {
            let inside = match server {
                IpAddr::V4(_) => Ipv4Addr::from_bits(NAME_SERVERS.0.to_bits() + number).into(),
                IpAddr::V6(_) => {
                    Ipv6Addr::from_bits(NAME_SERVERS.1.to_bits() + u128::from(number)).into()
                }
            };
            self.name_servers.push((inside, server));
        }
        for (name, value) in &host.proxies {
            if !name.eq_ignore_ascii_case("no_proxy")
                && let Some((server, port)) = authority(value)
            {
                self = self.with_server(server, port, host);
            }
        }
        self
    }

    /// Adds the port of a server, if it is on the loopback.
    #[must_use]
    pub fn with_server(mut self, server: &str, port: u16, host: &HostSettings) -> Self {
        if is_here(server, host) {
            self.ports.push(port);
        }
        self
    }

    /// The host's `resolv.conf` as the guest is to see it.
    pub fn resolv_conf(&self, of_host: &str) -> String {
        let line = |line: &str| {
            let server = name_server(line);
            let mut known = self.name_servers.iter();
            match known.find(|(_, outside)| Some(*outside) == server) {
                Some((inside, _)) => format!("nameserver {inside}\n"),
                None => format!("{line}\n"),
            }
        };
        of_host.lines().map(line).collect()
    }

    /// Where a connection, or a datagram, to this address goes; `None` if nowhere.
    pub fn target(&self, address: SocketAddr) -> Option<SocketAddr> {
        // A libc that asks servers of both families at once does so from one socket of IPv6.
        let inside = address.ip().to_canonical();
        let mut known = self.name_servers.iter();
        if let Some((_, outside)) = known.find(|(known, _)| *known == inside) {
            let outside = match *outside {
                IpAddr::V4(v4) if address.is_ipv6() => v4.to_ipv6_mapped().into(),
                outside => outside,
            };
            return (address.port() == DNS).then_some((outside, DNS).into());
        }
        let is_open =
            self.loopback || !is_local(address.ip()) || self.ports.contains(&address.port());
        is_open.then_some(address)
    }
}

/// Whether this is the loopback, as is the unspecified address for a connecting process.
fn is_local(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    ip.is_loopback() || ip.is_unspecified()
}

/// The same address on the loopback, where it is that of every interface.
pub fn narrowed(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, v6.port()).into(),
        SocketAddr::V6(v6) if v6.ip().to_canonical().is_unspecified() => {
            (Ipv4Addr::LOCALHOST.to_ipv6_mapped(), v6.port()).into()
        }
        other => other,
    }
}

/// The address in a line of `resolv.conf`. Without its scope: no loopback address has one.
fn name_server(line: &str) -> Option<IpAddr> {
    let mut words = line.split_ascii_whitespace();
    (words.next()? == "nameserver").then(|| words.next()?.parse().ok())?
}

/// Host and port of `http://user:password@host:port/`, of which host and port have to be there.
fn authority(url: &str) -> Option<(&str, u16)> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let rest = rest.split(['/', '?', '#']).next()?;
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    let (host, port) = rest.rsplit_once(':')?;
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    Some((host, port.parse().ok()?))
}

/// Whether a host's name or address is one of this machine's loopback, as far as that is known
/// without asking a name server.
fn is_here(server: &str, host: &HostSettings) -> bool {
    if let Ok(ip) = server.parse() {
        return is_local(ip);
    }
    if server.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let mut lines = host.hosts.iter().flat_map(|text| text.lines());
    lines.any(|line| {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let ip = words.next().and_then(|ip| ip.parse().ok());
        ip.is_some_and(is_local) && words.any(|name| name.eq_ignore_ascii_case(server))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_closed_but_for_what_is_allowed() {
        let reach = Reach::of_loopback([49134], false);
        for (address, allowed) in [
            ("93.184.216.34:443", true),
            ("[2606:2800::1]:443", true),
            ("192.168.1.2:5432", true),
            ("127.0.0.1:49134", true),
            ("[::1]:49134", true),
            ("127.0.0.1:5432", false),
            ("127.200.1.1:5432", false),
            ("[::1]:5432", false),
            ("0.0.0.0:5432", false),
            ("[::]:5432", false),
            ("[::ffff:127.0.0.1]:5432", false),
            ("[::ffff:0.0.0.0]:5432", false),
            ("127.0.0.53:53", false),
        ] {
            let to = address.parse().unwrap();
            assert_eq!(reach.target(to), allowed.then_some(to), "{address}");
        }
        let all = Reach::of_loopback([], true);
        let postgres = "127.0.0.1:5432".parse().unwrap();
        assert_eq!(all.target(postgres), Some(postgres));
    }

    #[test]
    fn what_the_host_uses_may_be_reached() {
        let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let host = HostSettings {
            resolv_conf: Some(
                "# nameserver ::1\nsearch corp\nnameserver 9.9.9.9\nnameserver 127.0.0.53\nnameserver ::1\n"
                    .into(),
            ),
            hosts: Some("127.0.0.1 localhost\n127.0.1.1 Box.corp box # not: other\n".into()),
            proxies: vec![
                variable("http_proxy", "http://me:it@LOCALHOST:3128/"),
                variable("HTTPS_PROXY", "[::1]:3129"),
                variable("ALL_PROXY", "socks5h://box:1080"),
                variable("all_proxy", "http://other:1081"),
                variable("https_proxy", "http://127.0.0.1"),
                variable("NO_PROXY", "localhost:1"),
            ],
            ..HostSettings::default()
        };
        let reach = Reach::default()
            .with_settings_of(&host)
            .with_server("127.0.0.1", 49134, &host)
            .with_server("engine.example", 49135, &host)
            .with_server("10.1.2.3", 49136, &host);
        assert_eq!(reach.ports, [3128, 3129, 1080, 49134]);
        assert_eq!(
            reach.resolv_conf(host.resolv_conf.as_deref().unwrap()),
            "# nameserver ::1\nsearch corp\nnameserver 9.9.9.9\nnameserver 192.0.2.53\nnameserver 2001:db8::36\n"
        );
        for (address, target) in [
            ("192.0.2.53:53", Some("127.0.0.53:53")),
            ("[2001:db8::36]:53", Some("[::1]:53")),
            ("[::ffff:192.0.2.53]:53", Some("[::ffff:127.0.0.53]:53")),
            ("192.0.2.53:80", None),
            ("[::ffff:192.0.2.53]:80", None),
            ("192.0.2.54:53", Some("192.0.2.54:53")),
        ] {
            let target = target.map(|target| target.parse().unwrap());
            assert_eq!(reach.target(address.parse().unwrap()), target);
        }
    }

    #[test]
    fn what_would_listen_everywhere_listens_on_the_loopback() {
        for (address, narrow) in [
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "[::1]:80"),
            ("[::ffff:0.0.0.0]:80", "[::ffff:127.0.0.1]:80"),
            ("127.0.0.2:80", "127.0.0.2:80"),
            ("10.0.0.1:80", "10.0.0.1:80"),
        ] {
            let (address, narrow) = (address.parse().unwrap(), narrow.parse().unwrap());
            assert_eq!(narrowed(address), narrow);
        }
    }
}
