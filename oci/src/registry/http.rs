//! One HTTP request, with the redirects that it leads through.

use std::fs::File;
use std::io::Seek as _;
use std::sync::OnceLock;
use std::time::Duration;

use ureq::http::{self, HeaderName, Method, Response, StatusCode, Uri, header};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, AsSendBody, Body, Proxy, SendBody};

use super::{MAX_REDIRECTS, Patience, Refusal, RegistryError, Settings, without_port};

/// Most bytes of the headers of one answer.
const MAX_HEADERS: usize = 64 << 10;
/// Most characters of an address that are shown.
const MAX_SHOWN: usize = 1000;
/// Bytes of one read of a connection: large enough that blobs do not wait for system calls.
const INPUT_BUFFER: usize = 256 << 10;
/// How long a body may take to be sent, however steadily it trickles, apart from its bytes at
/// [`MIN_RATE`].
const SEND_TIME: Duration = Duration::from_secs(60);
/// Bytes in a second that a registry must at least take.
const MIN_RATE: u64 = 16 << 10;

/// A request.
pub struct Request<'a> {
    pub method: Method,
    pub url: String,
    pub headers: Vec<(HeaderName, String)>,
    /// Not sent with a GET or HEAD.
    pub body: Payload<'a>,
}

/// Body of a request.
#[derive(Clone, Copy)]
pub enum Payload<'a> {
    Bytes(&'a [u8]),
    /// All of a file, from its beginning.
    File(&'a File),
}

impl Request<'_> {
    pub fn new(method: Method, url: impl Into<String>) -> Self {
        Self {
            method,
            url: url.into(),
            headers: Vec::new(),
            body: Payload::Bytes(&[]),
        }
    }

    /// Whether it changes nothing.
    pub fn is_read(&self) -> bool {
        self.method == Method::GET || self.method == Method::HEAD
    }
}

/// An answer whose body has not been read.
pub struct Sent {
    pub response: Response<Body>,
    /// Whether it comes from the host that was asked, and not from one that a redirect led to.
    pub is_from_asked: bool,
}

/// Sends requests, each through the proxy that is meant for it.
#[derive(Debug)]
pub struct Http {
    direct: Agent,
    plain: Option<Agent>,
    secure: Option<Agent>,
    except: Vec<String>,
}

impl Http {
    pub fn new(settings: &Settings) -> Result<Self, RegistryError> {
        let tls = TlsConfig::builder()
            .root_certs(roots().clone())
            .unversioned_rustls_crypto_provider(rustls::crypto::ring::default_provider().into())
            .build();
        let agent = |proxy| agent(&settings.patience, tls.clone(), proxy);
        let through = |url: &Option<String>| {
            let parse = |url: &String| {
                Proxy::new(url).map_err(|_| RegistryError::Setting {
                    variable: "the variable for proxies",
                    // It may have a password in it.
                    text: url.rsplit('@').next().unwrap_or_default().to_owned(),
                    expected: "the address of a proxy",
                })
            };
            let proxy = url.as_ref().map(parse).transpose()?;
            Ok::<_, RegistryError>(proxy.map(|proxy| agent(Some(proxy))))
        };
        Ok(Self {
            plain: through(&settings.proxies.http)?,
            secure: through(&settings.proxies.https)?,
            direct: agent(None),
            except: settings.proxies.except.clone(),
        })
    }

    fn agent(&self, url: &Uri) -> &Agent {
        let host = without_port(url.host().unwrap_or_default());
        let below = |domain: &String| {
            host == domain
                || host
                    .strip_suffix(domain.as_str())
                    .is_some_and(|rest| rest.ends_with('.') || domain.is_empty())
        };
        let is_here = host == "localhost" || host.starts_with("127.") || host == "[::1]";
        if is_here || self.except.iter().any(below) {
            return &self.direct;
        }
        let proxied = if is_https(url) {
            &self.secure
        } else {
            &self.plain
        };
        proxied.as_ref().unwrap_or(&self.direct)
    }

    /// Sends a request. The redirects of a GET or HEAD are followed: never from https to http, and
    /// with `authorization` only as long as they stay on the host that was asked. A request
    /// that changes something follows no redirect: the redirect is its answer.
    pub fn send(
        &self,
        request: &Request<'_>,
        authorization: Option<&str>,
    ) -> Result<Sent, Refusal> {
        let address = |error| (error, None);
        let asked = checked(&request.url, &request.url).map_err(address)?;
        let mut at = asked.clone();
        for _ in 0..=MAX_REDIRECTS {
            let is_from_asked = is_same_host(&at, &asked);
            let mut builder = http::Request::builder().method(&request.method).uri(&at);
            for (name, value) in &request.headers {
                builder = builder.header(name, value);
            }
            if let Some(authorization) = authorization
                && is_from_asked
            {
                builder = builder.header(header::AUTHORIZATION, authorization);
            }
            let agent = self.agent(&at);
            let sent = match request.body {
                _ if request.is_read() => run(agent, builder, SendBody::none(), 0),
                Payload::Bytes(bytes) => run(agent, builder, bytes, bytes.len() as u64),
                Payload::File(mut file) => file
                    .rewind()
                    .and_then(|()| file.metadata())
                    .map_err(ureq::Error::Io)
                    .and_then(|metadata| run(agent, builder, file, metadata.len())),
            };
            let response = sent.map_err(|source| failed(&at, source))?;
            if !request.is_read() || !is_redirect(response.status()) {
                return Ok(Sent {
                    response,
                    is_from_asked,
                });
            }
            let location = super::header_text(&response, &header::LOCATION).unwrap_or_default();
            at = next(&at, &location).map_err(address)?;
        }
        let url = without_query(&request.url);
        Err((RegistryError::Redirects { url }, None))
    }

    /// Sends a form, and follows no redirect: it has a secret in it.
    pub fn post_form(&self, url: &Uri, form: &str) -> Result<Response<Body>, Refusal> {
        let request = self.agent(url).post(url);
        request
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .send(form)
            .map_err(|source| failed(url, source))
    }
}

/// Sends a body of `size` bytes, in a time that allows for its size.
fn run(
    agent: &Agent,
    builder: http::request::Builder,
    body: impl AsSendBody,
    size: u64,
) -> Result<Response<Body>, ureq::Error> {
    let time = SEND_TIME + Duration::from_secs(size / MIN_RATE);
    let request = agent
        .configure_request(builder.body(body)?)
        .timeout_send_body(Some(time))
        .build();
    agent.run(request)
}

/// The certificates that this machine trusts, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`. One
/// that cannot be read is missing, which shows when it is needed.
fn roots() -> &'static RootCerts {
    static ROOTS: OnceLock<RootCerts> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs().certs;
        let owned = |der: &rustls::pki_types::CertificateDer<'_>| {
            Certificate::from_der(der.as_ref()).to_owned()
        };
        RootCerts::from(found.iter().map(owned))
    })
}

fn agent(patience: &Patience, tls: TlsConfig, proxy: Option<Proxy>) -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("iii/", env!("CARGO_PKG_VERSION")))
        .max_response_header_size(MAX_HEADERS)
        .input_buffer_size(INPUT_BUFFER)
        .timeout_resolve(Some(patience.connect))
        .timeout_connect(Some(patience.connect))
        .timeout_per_read(Some(patience.idle))
        .timeout_per_write(Some(patience.idle))
        .timeout_recv_response(Some(patience.idle * 2))
        .tls_config(tls)
        .proxy(proxy)
        .build()
        .new_agent()
}

fn failed(url: &Uri, source: ureq::Error) -> Refusal {
    let error = RegistryError::Http {
        url: without_query(&url.to_string()),
        source: Box::new(source),
    };
    (error, None)
}

/// An address for messages: the part after the question mark may be a secret.
pub fn without_query(url: &str) -> String {
    let shown = url.split('?').next().unwrap_or_default();
    shown.chars().take(MAX_SHOWN).collect()
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn is_https(url: &Uri) -> bool {
    url.scheme_str() == Some("https")
}

/// Whether a login for one address may go to the other.
pub fn is_same_host(one: &Uri, other: &Uri) -> bool {
    one.authority() == other.authority() && one.scheme() == other.scheme()
}

/// An http or https address without a user in it.
pub fn parse(text: &str) -> Option<Uri> {
    let url: Uri = text.parse().ok()?;
    let fits = matches!(url.scheme_str(), Some("http" | "https"))
        && url.authority()?.as_str().find('@').is_none()
        && !url.host()?.is_empty();
    fits.then_some(url)
}

/// The address `to` that `from` sends us to, unless it is less protected.
pub fn checked(from: &str, to: &str) -> Result<Uri, RegistryError> {
    let (url, shown) = (without_query(from), without_query(to));
    let Some(to) = parse(to) else {
        return Err(RegistryError::Address { url, to: shown });
    };
    if from.starts_with("https:") && !is_https(&to) {
        return Err(RegistryError::Downgrade { url, to: shown });
    }
    Ok(to)
}

/// Where an answer from `at` leads: an address, or what is to be put in place of the end of this
/// one (RFC 3986, without its dots).
pub fn next(at: &Uri, location: &str) -> Result<Uri, RegistryError> {
    let from = at.to_string();
    let scheme = at.scheme_str().unwrap_or_default();
    let authority = at.authority().map_or("", |authority| authority.as_str());
    let has_scheme = || {
        let first = location.split(['/', '?', '#']).next().unwrap_or_default();
        first.contains(':')
    };
    let to = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.is_empty() || has_scheme() {
        location.to_owned()
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", at.path())
    } else {
        let path = at.path();
        let dir = &path[..=path.rfind('/').unwrap_or_default()];
        format!("{scheme}://{authority}{dir}{location}")
    };
    checked(&from, &to)
}

/// Fields as in the query of an address.
pub fn form(fields: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in fields {
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(name);
        text.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                text.push(byte.into());
            } else {
                use std::fmt::Write as _;
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}
