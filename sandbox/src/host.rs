//! Settings of the host that are visible in every sandbox: its DNS settings, its `hosts`, and, when
//! it trusts a private certificate authority, its trust store.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use iii_init::message::HostFile;

/// Where the host's trust store lies in a sandbox, when there is one to hand on.
pub const CA_BUNDLE: &str = "/run/iii/ca-certificates.crt";

/// The variables through which programs are told of a trust store. Set on the host, they name the
/// host's; inside they name [`CA_BUNDLE`].
const CA_VARIABLES: [&str; 8] = [
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "npm_config_cafile",
];

/// Where administrators put certificates of their own (Debian, Fedora, SUSE).
const LOCAL_CERTIFICATES: [&str; 3] = [
    "usr/local/share/ca-certificates",
    "etc/pki/ca-trust/source/anchors",
    "etc/pki/trust/anchors",
];

/// Where distributions keep the bundle of everything trusted.
const SYSTEM_BUNDLES: [&str; 4] = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/ssl/ca-bundle.pem",
    "etc/ssl/cert.pem",
];

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Larger files than this are none of ours; a distribution's bundle is about 220 KiB.
const MAX_HOST_FILE: u64 = 4 << 20;

/// Most files taken from a directory of local certificates.
const MAX_LOCAL_CERTIFICATES: usize = 256;

/// The host's settings that a sandbox sees. Nothing of this enters a layer: the files lie on a
/// tmpfs above them. Where an image lacks `/etc/resolv.conf` or `/etc/hosts`, an empty file to
/// mount over is all that is left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostSettings {
    /// Contents of `/etc/resolv.conf`. A resolver on a loopback address works, the network being
    /// shared.
    pub resolv_conf: Option<String>,
    /// Contents of `/etc/hosts`, without the sandbox's own name.
    pub hosts: Option<String>,
    /// PEM certificates, when the host has been told to trust more than its distribution does.
    pub ca_bundle: Option<String>,
    /// The variables of [`PROXY_VARIABLES`] that are set. The network being shared, a proxy on a
    /// loopback address works.
    pub proxies: Vec<(String, String)>,
}

/// How programs are told of a proxy; some read one case, some the other.
const PROXY_VARIABLES: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
];

impl HostSettings {
    /// This host's, from its files and environment variables.
    pub fn detect(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        Self::detect_in(Path::new("/"), variable)
    }

    fn detect_in(root: &Path, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        Self {
            resolv_conf: read(&root.join("etc/resolv.conf")),
            hosts: read(&root.join("etc/hosts")),
            ca_bundle: ca_bundle(root, &variable),
            proxies: PROXY_VARIABLES
                .into_iter()
                .filter_map(|name| Some((name.into(), variable(name)?.into_string().ok()?)))
                .collect(),
        }
    }

    /// The files to place on `/run/iii`.
    pub(super) fn files(&self, hostname: &str) -> Vec<HostFile> {
        let mut files = vec![HostFile {
            name: "hosts".into(),
            covers: Some("/etc/hosts".into()),
            contents: hosts(self.hosts.as_deref().unwrap_or_default(), hostname),
        }];
        files.extend(self.resolv_conf.as_ref().map(|contents| HostFile {
            name: "resolv.conf".into(),
            covers: Some("/etc/resolv.conf".into()),
            contents: contents.clone(),
        }));
        files.extend(self.ca_bundle.as_ref().map(|contents| HostFile {
            name: "ca-certificates.crt".into(),
            covers: None,
            contents: contents.clone(),
        }));
        files
    }

    /// Adds the proxies and the variables that point at [`CA_BUNDLE`]; those that `env` sets
    /// already stay.
    pub fn extend_env(&self, env: &mut Vec<(String, String)>) {
        let bundle = |_: &String| CA_VARIABLES.map(|name| (name.to_owned(), CA_BUNDLE.to_owned()));
        let certificates = self.ca_bundle.iter().flat_map(bundle);
        for (name, value) in self.proxies.iter().cloned().chain(certificates) {
            if env.iter().all(|(set, _)| *set != name) {
                env.push((name, value));
            }
        }
    }
}

fn hosts(of_host: &str, hostname: &str) -> String {
    let mut contents = of_host.to_owned();
    if contents.is_empty() {
        contents.push_str("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    }
    if !contents.ends_with('\n') {
        contents.push('\n');
    }
    contents.extend(["127.0.0.1 ", hostname, "\n"]);
    contents
}

/// The certificates that the environment names, those that the administrator added, and the
/// distribution's: each once. A variable may name a file with nothing but the private authority in
/// it, which alone would not do for the variables that replace the trust store.
fn ca_bundle(root: &Path, variable: &impl Fn(&str) -> Option<OsString>) -> Option<String> {
    let mut paths: Vec<PathBuf> = CA_VARIABLES
        .into_iter()
        .filter_map(variable)
        .map(PathBuf::from)
        .collect();
    for directory in LOCAL_CERTIFICATES {
        let Ok(entries) = fs::read_dir(root.join(directory)) else {
            continue;
        };
        let certificates = entries.filter_map(Result::ok).map(|entry| entry.path());
        let mut certificates: Vec<_> = certificates.take(MAX_LOCAL_CERTIFICATES).collect();
        certificates.sort();
        paths.append(&mut certificates);
    }
    if paths.is_empty() {
        return None;
    }
    paths.extend(SYSTEM_BUNDLES.iter().map(|path| root.join(path)));

    let mut read_already = HashSet::new();
    let mut seen = HashSet::new();
    let mut bundle = String::new();
    for path in paths {
        let path = fs::canonicalize(&path).unwrap_or(path);
        if !read_already.insert(path.clone()) {
            continue;
        }
        let contents = read(&path).unwrap_or_default();
        for certificate in certificates(&contents) {
            if !seen.contains(certificate) {
                seen.insert(certificate.to_owned());
                bundle.extend([BEGIN, certificate, END, "\n"]);
            }
        }
    }
    (!bundle.is_empty()).then_some(bundle)
}

/// The bodies of the PEM certificates in `text`, without what stands around them.
fn certificates(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, from_body) = rest.split_once(BEGIN)?;
        let (body, after) = from_body.split_once(END)?;
        rest = after;
        Some(body)
    })
}

/// A regular file's contents; `None` if it cannot be read or is too large.
fn read(path: &Path) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > MAX_HOST_FILE {
        return None;
    }
    let mut contents = Vec::with_capacity(metadata.len() as usize);
    let file = File::open(path).ok()?;
    file.take(MAX_HOST_FILE).read_to_end(&mut contents).ok()?;
    Some(match String::from_utf8(contents) {
        Ok(contents) => contents,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(body: &str) -> String {
        format!("{BEGIN}\n{body}\n{END}")
    }

    /// A host whose distribution trusts A and B.
    fn host() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("tempdir");
        let certs = root.path().join("etc/ssl/certs");
        fs::create_dir_all(&certs).expect("mkdir");
        let bundle = format!("# A\n{}\n# B\n{}\n", pem("A"), pem("B"));
        fs::write(certs.join("ca-certificates.crt"), bundle).expect("write");
        root
    }

    fn detected(root: &Path, variables: &[(&str, PathBuf)]) -> Option<String> {
        ca_bundle(root, &|name: &str| {
            let set = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(set.1.clone().into_os_string())
        })
    }

    #[test]
    fn a_host_without_a_private_authority_hands_nothing_on() {
        assert_eq!(detected(host().path(), &[]), None);
        let settings = HostSettings::default();
        let mut env = Vec::new();
        settings.extend_env(&mut env);
        assert_eq!(env, []);
    }

    #[test]
    fn private_authorities_join_the_distribution_s() {
        let root = host();
        let private = root.path().join("corp.pem");
        fs::write(&private, pem("CORP")).expect("write");
        let expected = [pem("CORP"), pem("A"), pem("B"), String::new()].join("\n");
        let named = [
            ("NODE_EXTRA_CA_CERTS", private.clone()),
            ("PIP_CERT", private.clone()),
        ];
        assert_eq!(detected(root.path(), &named), Some(expected.clone()));

        let local = root.path().join(LOCAL_CERTIFICATES[0]);
        fs::create_dir_all(&local).expect("mkdir");
        fs::write(
            local.join("corp.crt"),
            format!("{}\n{}", pem("CORP"), pem("A")),
        )
        .expect("write");
        assert_eq!(detected(root.path(), &[]), Some(expected.clone()));
        assert_eq!(detected(root.path(), &named), Some(expected));
    }

    #[test]
    fn names_of_nothing_useful_are_passed_over() {
        let root = host();
        let named = [
            ("SSL_CERT_FILE", root.path().join("missing")),
            ("CURL_CA_BUNDLE", root.path().to_owned()),
        ];
        let expected = [pem("A"), pem("B"), String::new()].join("\n");
        assert_eq!(detected(root.path(), &named), Some(expected));
        let empty = tempfile::tempdir().expect("tempdir");
        assert_eq!(detected(empty.path(), &named[..1]), None);
    }

    #[test]
    fn variables_that_are_set_stay() {
        let settings = HostSettings {
            ca_bundle: Some(pem("A")),
            ..HostSettings::default()
        };
        let mut env = vec![("PIP_CERT".to_owned(), "/mine".to_owned())];
        settings.extend_env(&mut env);
        assert_eq!(env.len(), CA_VARIABLES.len());
        for (name, value) in env {
            assert_eq!(
                value,
                if name == "PIP_CERT" {
                    "/mine"
                } else {
                    CA_BUNDLE
                }
            );
        }
    }

    #[test]
    fn proxies_are_handed_on_under_the_names_that_are_set() {
        let set = |name: &str| (name == "HTTPS_PROXY").then(|| OsString::from("http://proxy:1"));
        let settings = HostSettings::detect_in(host().path(), set);
        let mut env = Vec::new();
        settings.extend_env(&mut env);
        assert_eq!(
            env,
            [("HTTPS_PROXY".to_owned(), "http://proxy:1".to_owned())]
        );
    }

    #[test]
    fn hosts_name_the_sandbox() {
        assert_eq!(
            hosts("1.2.3.4 corp", "box"),
            "1.2.3.4 corp\n127.0.0.1 box\n"
        );
        assert!(hosts("", "box").starts_with("127.0.0.1 localhost\n"));
    }
}
