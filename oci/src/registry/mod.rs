//! Images in registries: the part of the OCI distribution protocol that pulling and pushing need,
//! over blocking HTTP.
//!
//! A registry may lie. Its answers are bounded before they are read: redirects, challenges,
//! retries, the size of documents and tokens, the rate at which a blob trickles. Blobs are checked
//! against their digests by their readers (see [`stream`](super::stream)); nothing here
//! decides that bytes are right.
//!
//! [`http`] sends one request, [`auth`] knows who we are, [`blob`] reads a blob across broken
//! connections, and [`push`] sends one.

mod auth;
mod blob;
mod http;
mod push;

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::Body;
use ureq::http::{Method, Response, StatusCode, header};

use super::digest::Digest;
use super::reference::{self, Reference};
use super::text::shown;
use auth::{Challenge, Credentials};
use http::{Http, Request};

pub use auth::{AuthFiles, Variables};
pub use push::{CHUNK, Upload};

/// Most redirects followed for one request.
pub const MAX_REDIRECTS: usize = 8;
/// Most times that one request is answered with a challenge that we meet.
const MAX_CHALLENGES: usize = 2;
/// Longest token that is sent along, in bytes, and longest answer that has one.
const MAX_TOKEN: usize = 16 << 10;
const MAX_TOKEN_ANSWER: u64 = 128 << 10;
/// Bytes of an error's body that are looked at, and of its message that are shown.
const MAX_ERROR_BODY: u64 = 16 << 10;
const MAX_ERROR_SHOWN: usize = 300;
/// Longest wait that a registry may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);
/// Longest wait between two tries.
const MAX_BACKOFF: Duration = Duration::from_secs(8);
/// How long a document may take, however steadily it trickles.
const DOCUMENT_TIME: Duration = Duration::from_secs(120);
/// Most mirrors of one registry.
const MAX_MIRRORS: usize = 8;

/// Where blobs and manifests of `docker.io` really are.
const DOCKER_HOST: &str = "registry-1.docker.io";

const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Why a request to a registry failed. Every message names the address, and with it
/// registry, repository and digest.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A variable of the environment makes no sense.
    #[error("{variable} is {text:?}, which is not {expected}")]
    Setting {
        /// The variable.
        variable: &'static str,
        /// The part of its value.
        text: String,
        /// The expected form.
        expected: &'static str,
    },
    /// No answer.
    #[error("requesting {url} failed")]
    Http {
        /// Address of the request.
        url: String,
        /// The cause.
        source: Box<ureq::Error>,
    },
    /// No such thing there.
    #[error("{url} does not exist{detail}")]
    NotFound {
        /// Address of the request.
        url: String,
        /// Message of the registry, if any.
        detail: String,
    },
    /// Not for us.
    #[error("{host} refuses access to {url} {who}{detail}")]
    Unauthorized {
        /// The registry.
        host: String,
        /// Address of the request.
        url: String,
        /// As whom it was asked for.
        who: &'static str,
        /// Message of the registry, if any.
        detail: String,
    },
    /// An unexpected answer.
    #[error("{url} answers {status}{detail}")]
    Status {
        /// Address of the request.
        url: String,
        /// The HTTP status.
        status: u16,
        /// Message of the registry, if any.
        detail: String,
    },
    /// From https to http.
    #[error("{url} leads to {to}, which is not encrypted")]
    Downgrade {
        /// Address of the request.
        url: String,
        /// Where it leads.
        to: String,
    },
    /// To nowhere.
    #[error("{url} leads to {to:?}, which is not an http or https address")]
    Address {
        /// Address of the request.
        url: String,
        /// Where it leads.
        to: String,
    },
    /// Too many redirects, most likely in a circle.
    #[error("{url} leads through more than {MAX_REDIRECTS} redirects")]
    Redirects {
        /// Address of the request.
        url: String,
    },
    /// An unknown way to log in.
    #[error("{url} asks for a login in a way that is not supported")]
    Challenge {
        /// Address of the request.
        url: String,
    },
    /// No token.
    #[error("{url} gives no token that can be used")]
    Token {
        /// Where it was asked for.
        url: String,
    },
    /// Announced with another length than was promised.
    #[error("{url} has {actual} bytes, but {expected} were promised")]
    Length {
        /// The blob.
        url: String,
        /// The size in its descriptor.
        expected: u64,
        /// The size that the registry announces.
        actual: u64,
    },
    /// Not for us to write.
    #[error("{host} does not let you push to {repository} {who}{detail}")]
    NotAllowed {
        /// The registry.
        host: String,
        /// The repository.
        repository: String,
        /// As whom it was tried.
        who: &'static str,
        /// Message of the registry, if any.
        detail: String,
    },
    /// Takes only blobs that fit into one request.
    #[error("{host} does not take a blob in pieces{detail}")]
    Pieces {
        /// The registry.
        host: String,
        /// Message of the registry, if any.
        detail: String,
    },
    /// Bytes of an upload that were not sent, or are not there any more.
    #[error("{url} says that it has {has} bytes of the {sent} that were sent")]
    Offset {
        /// The upload.
        url: String,
        /// How much was sent.
        sent: u64,
        /// How much of it the registry says that it has.
        has: u64,
    },
    /// Something else than was sent.
    #[error("{url} was sent {expected} and says that it stored {actual}")]
    Stored {
        /// Where it was sent.
        url: String,
        /// Its digest.
        expected: Digest,
        /// The registry's digest of it.
        actual: String,
    },
    /// Another part of a blob than the one that was asked for.
    #[error("{url} does not go on from where it broke off")]
    Range {
        /// The blob.
        url: String,
    },
    /// So slow that it would never end.
    #[error("{url} sends less than {min} bytes in {seconds} s", min = blob::MIN_WINDOW)]
    Slow {
        /// The blob.
        url: String,
        /// For how long.
        seconds: u64,
    },
    /// Broken off again and again.
    #[error("{url} broke off at byte {at} of {size} and could not be resumed")]
    Broken {
        /// The blob.
        url: String,
        /// How far it came.
        at: u64,
        /// Its size.
        size: u64,
        /// The cause, the last time.
        source: io::Error,
    },
    /// A file with credentials could not be read.
    #[error("reading the credentials in {} failed", path.display())]
    AuthFile {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file with credentials does not parse. The cause is not shown: it might quote a secret.
    #[error("{} is not a valid file of credentials", path.display())]
    AuthSyntax {
        /// The file.
        path: PathBuf,
    },
    /// A credential helper did not run.
    #[error("the credential helper {program} failed")]
    Helper {
        /// The program.
        program: String,
        /// The cause.
        source: io::Error,
    },
}

impl RegistryError {
    /// Whether the same request may succeed a moment later.
    pub fn is_passing(&self) -> bool {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof,
        };
        match self {
            Self::Http { source, .. } => match source.as_ref() {
                // An absent server stays absent for a while.
                ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => false,
                ureq::Error::Timeout(_) => true,
                ureq::Error::Io(error) => matches!(
                    error.kind(),
                    BrokenPipe | ConnectionAborted | ConnectionReset | TimedOut | UnexpectedEof
                ),
                _ => false,
            },
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }
}

/// How long to wait, and how often to try again.
#[derive(Debug, Clone)]
pub struct Patience {
    /// For a name to resolve, and for a connection.
    pub connect: Duration,
    /// For the next bytes.
    pub idle: Duration,
    /// Before the second try; doubled before each further one.
    pub backoff: Duration,
    /// Tries of one request, and tries to resume a blob that bring nothing.
    pub tries: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            idle: Duration::from_secs(30),
            backoff: Duration::from_millis(250),
            tries: 5,
        }
    }
}

impl Patience {
    /// Waits before try number `tried` (from 1).
    pub fn pause(&self, tried: u32) {
        let factor = 1 << tried.saturating_sub(1).min(16);
        std::thread::sleep(self.backoff.saturating_mul(factor).min(MAX_BACKOFF));
    }

    /// The same, or as long as the registry asks for.
    fn wait(&self, tried: u32, asked: Option<Duration>) {
        match asked {
            Some(time) => std::thread::sleep(time),
            None => self.pause(tried),
        }
    }
}

/// A host to ask instead of a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The registry, as names of images have it.
    pub of: String,
    /// The host, with its port if it has one.
    pub host: String,
    /// Prefix of the repository there; empty, or ending in a slash.
    pub prefix: String,
}

/// Proxies, by the scheme of what is asked for.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    /// For http.
    pub http: Option<String>,
    /// For https.
    pub https: Option<String>,
    /// Hosts that are asked directly, with the domains below them; all of them where one is empty.
    pub except: Vec<String>,
}

/// The user's settings about registries.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Hosts, with or without a port, that are spoken to without TLS.
    pub insecure: Vec<String>,
    /// Asked before the registries that they stand for, in this order.
    pub mirrors: Vec<Mirror>,
    /// How to get out of here.
    pub proxies: Proxies,
    /// Files with credentials.
    pub auth: AuthFiles,
    /// How long to wait.
    pub patience: Patience,
}

impl Settings {
    /// Settings of the environment: `III_INSECURE_REGISTRIES`, `III_REGISTRY_MIRRORS`, the usual
    /// variables for proxies, and where docker and podman keep their credentials.
    pub fn from_variables(variables: Variables<'_>) -> Result<Self, RegistryError> {
        let text = |name: &str| variables(name).and_then(|value| value.into_string().ok());
        let list = |variable| {
            let text = text(variable).unwrap_or_default();
            let parts = text.split(',').map(str::trim);
            parts
                .filter(|part| !part.is_empty())
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let first = |names: &[&str]| {
            let mut values = names.iter().filter_map(|name| text(name));
            values.find(|value| !value.is_empty())
        };
        Ok(Self {
            insecure: list("III_INSECURE_REGISTRIES"),
            mirrors: parse_mirrors(&list("III_REGISTRY_MIRRORS"))?,
            proxies: Proxies {
                http: first(&["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]),
                https: first(&["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]),
                except: first(&["no_proxy", "NO_PROXY"])
                    .unwrap_or_default()
                    .split(',')
                    .map(str::trim)
                    .filter(|part| !part.is_empty())
                    // Of `*` nothing is left, which every host is below.
                    .map(|part| part.trim_start_matches('*').trim_start_matches('.'))
                    .map(str::to_owned)
                    .collect(),
            },
            auth: AuthFiles::from_variables(variables),
            patience: Patience::default(),
        })
    }

    fn is_insecure(&self, host: &str) -> bool {
        let bare = without_port(host);
        matches!(bare, "localhost" | "127.0.0.1" | "[::1]")
            || self.insecure.iter().any(|one| one == host || one == bare)
    }
}

fn parse_mirrors(entries: &[String]) -> Result<Vec<Mirror>, RegistryError> {
    let parse = |entry: &String| {
        let (of, place) = entry.split_once('=')?;
        let (host, prefix) = place.split_once('/').unwrap_or((place, ""));
        // A mirror has the form of a part of an image's name.
        let name: Reference = format!("{host}/{prefix}/x")
            .replace("//", "/")
            .parse()
            .ok()?;
        let prefix = name.repository().strip_suffix('x')?.to_owned();
        (name.registry() == host && !of.is_empty()).then(|| Mirror {
            of: of.to_owned(),
            host: host.to_owned(),
            prefix,
        })
    };
    let wrong = |entry: &String| RegistryError::Setting {
        variable: "III_REGISTRY_MIRRORS",
        text: entry.clone(),
        expected: "REGISTRY=HOST[:PORT][/PREFIX]",
    };
    entries
        .iter()
        .map(|entry| parse(entry).ok_or_else(|| wrong(entry)))
        .collect()
}

/// The host alone.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((bare, port)) if !port.ends_with(']') => bare,
        _ => host,
    }
}

/// One repository, in its registry and mirrors. All reads of it, documents and blobs, come through
/// here; any number of threads may ask at once.
#[derive(Debug)]
pub struct Repository {
    http: Http,
    /// Asked first.
    mirrors: Vec<Place>,
    itself: Place,
    patience: Patience,
}

/// A repository on one host.
#[derive(Debug)]
struct Place {
    host: String,
    /// Address of the repository, without a slash at its end.
    base: String,
    repository: String,
    /// Actions that a token has to permit.
    actions: &'static str,
    auth: AuthFiles,
    /// Names that credentials for this host may have.
    known_as: Vec<String>,
    login: Mutex<Login>,
}

/// Headers of requests.
#[derive(Default)]
struct Login {
    authorization: Option<String>,
    /// Counts what was sent along, so that a thread sees whether another has logged in again
    /// meanwhile.
    number: u64,
    has_credentials: bool,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// The object of a request.
#[derive(Debug, Clone, Copy)]
enum Item<'a> {
    /// A manifest or an index, by tag or digest.
    Manifest(&'a str),
    Blob(&'a Digest),
}

/// An answer whose body has not been read.
struct Answer {
    url: String,
    response: Response<Body>,
}

impl Repository {
    /// The repository that `name` is in. Nothing is asked yet.
    pub fn new(name: &Reference, settings: &Settings) -> Result<Arc<Self>, RegistryError> {
        Self::with_actions(name, settings, "pull")
    }

    /// As [`Repository::new`], with tokens that allow `actions`.
    fn with_actions(
        name: &Reference,
        settings: &Settings,
        actions: &'static str,
    ) -> Result<Arc<Self>, RegistryError> {
        let registry = name.registry();
        let mirrors = settings
            .mirrors
            .iter()
            .filter(|mirror| mirror.of == registry)
            .take(MAX_MIRRORS)
            .map(|mirror| {
                let repository = format!("{}{}", mirror.prefix, name.repository());
                Place::new(
                    &mirror.host,
                    vec![mirror.host.clone()],
                    repository,
                    actions,
                    settings,
                )
            })
            .collect();
        let (host, known_as) = if registry == reference::DEFAULT_REGISTRY {
            let aliases = [registry, "index.docker.io", DOCKER_HOST];
            (DOCKER_HOST, aliases.map(str::to_owned).to_vec())
        } else {
            (registry, vec![registry.to_owned()])
        };
        let repository = name.repository().to_owned();
        let itself = Place::new(host, known_as, repository, actions, settings);
        Ok(Arc::new(Self {
            http: Http::new(settings)?,
            mirrors,
            itself,
            patience: settings.patience.clone(),
        }))
    }

    /// Opens a manifest or an index, by its tag or digest. Also returns its media type as the
    /// registry gives it.
    pub fn manifest(
        &self,
        tag_or_digest: &str,
    ) -> Result<(Box<dyn Read + Send>, Option<String>), RegistryError> {
        let answer = self.get(Item::Manifest(tag_or_digest), 0)?;
        let media_type = header_text(&answer.response, &header::CONTENT_TYPE)
            .map(|text| text.split(';').next().unwrap_or_default().trim().to_owned());
        let reader = Hasty::new(answer.response.into_body().into_reader());
        Ok((Box::new(reader), media_type))
    }

    /// Opens a blob of `size` bytes. Reading it goes on where it broke off.
    pub fn blob(
        self: &Arc<Self>,
        digest: Digest,
        size: u64,
    ) -> Result<Box<dyn Read + Send>, RegistryError> {
        Ok(Box::new(blob::Resumed::open(
            Arc::clone(self),
            digest,
            size,
        )?))
    }

    /// Asks one place after the other. The error is that of the last one, the registry itself.
    fn get(&self, item: Item<'_>, from: u64) -> Result<Answer, RegistryError> {
        let mut mirrors = self.mirrors.iter();
        let mirrored = mirrors.find_map(|place| self.get_at(place, item, from).ok());
        mirrored.map_or_else(|| self.get_at(&self.itself, item, from), Ok)
    }

    fn get_at(&self, place: &Place, item: Item<'_>, from: u64) -> Result<Answer, RegistryError> {
        let url = match item {
            Item::Manifest(name) => format!("{}/manifests/{name}", place.base),
            Item::Blob(digest) => format!("{}/blobs/{digest}", place.base),
        };
        let mut request = Request::new(Method::GET, &*url);
        if let Item::Manifest(_) = item {
            let accept = (header::ACCEPT, MANIFESTS.to_owned());
            request.headers.push(accept);
        }
        if from > 0 {
            let range = (header::RANGE, format!("bytes={from}-"));
            request.headers.push(range);
        }
        let wanted = [StatusCode::OK, StatusCode::PARTIAL_CONTENT];
        let response = self.ask(place, &request, &wanted)?;
        Ok(Answer { url, response })
    }

    /// Sends a request until it is answered as `wanted`, or in a way that will not change.
    fn ask(
        &self,
        place: &Place,
        request: &Request<'_>,
        wanted: &[StatusCode],
    ) -> Result<Response<Body>, RegistryError> {
        let mut tried = 1;
        loop {
            let (error, wait) = match self.ask_once(place, request, wanted) {
                Ok(response) => return Ok(response),
                Err(refusal) => refusal,
            };
            if !error.is_passing() || tried >= self.patience.tries {
                return Err(error);
            }
            self.patience.wait(tried, wait);
            tried += 1;
        }
    }

    /// Sends a request, with the login that it takes.
    fn ask_once(
        &self,
        place: &Place,
        request: &Request<'_>,
        wanted: &[StatusCode],
    ) -> Result<Response<Body>, Refusal> {
        // An upload may go to another host: the login stays here.
        let is_here = place.has(&request.url);
        let mut challenges = 0;
        loop {
            let (authorization, number) = place.authorization();
            let authorization = authorization.filter(|_| is_here);
            let sent = self.http.send(request, authorization.as_deref())?;
            let status = sent.response.status();
            if wanted.contains(&status) {
                return Ok(sent.response);
            }
            let is_challenge = status == StatusCode::UNAUTHORIZED && is_here && sent.is_from_asked;
            if !is_challenge || challenges >= MAX_CHALLENGES {
                let url = http::without_query(&request.url);
                let refusal = place.refusal(url, sent.response, place.has_login());
                return Err(if request.is_read() {
                    refusal
                } else {
                    place.not_allowed(refusal)
                });
            }
            challenges += 1;
            place
                .log_in(&self.http, &request.url, &sent.response, number)
                .map_err(|error| (error, None))?;
        }
    }
}

/// Opens what is at `url`, which needs no login. Redirects are followed as for blobs; nothing is
/// tried twice.
pub fn download(url: &str, settings: &Settings) -> Result<Box<dyn Read + Send>, RegistryError> {
    let sent = Http::new(settings)?.send(&Request::new(Method::GET, url), None);
    let response = sent.map_err(|(error, _)| error)?.response;
    match response.status() {
        StatusCode::OK => Ok(Box::new(response.into_body().into_reader())),
        status => Err(RegistryError::Status {
            url: url.to_owned(),
            status: status.as_u16(),
            detail: String::new(),
        }),
    }
}

/// An error, and how long the registry asks to wait.
type Refusal = (RegistryError, Option<Duration>);

impl Place {
    fn new(
        host: &str,
        known_as: Vec<String>,
        repository: String,
        actions: &'static str,
        settings: &Settings,
    ) -> Self {
        let scheme = if settings.is_insecure(host) {
            "http"
        } else {
            "https"
        };
        Self {
            host: host.to_owned(),
            base: format!("{scheme}://{host}/v2/{repository}"),
            repository,
            actions,
            auth: settings.auth.clone(),
            known_as,
            login: Mutex::default(),
        }
    }

    /// Whether `url` is on this host.
    fn has(&self, url: &str) -> bool {
        let both = http::parse(url).zip(http::parse(&self.base));
        both.is_some_and(|(url, base)| http::is_same_host(&url, &base))
    }

    fn authorization(&self) -> (Option<String>, u64) {
        let login = self.login.lock().unwrap_or_else(PoisonError::into_inner);
        (login.authorization.clone(), login.number)
    }

    /// Does what the challenge in `response` asks for, unless another thread has done so since
    /// `number`.
    fn log_in(
        &self,
        http: &Http,
        url: &str,
        response: &Response<Body>,
        number: u64,
    ) -> Result<(), RegistryError> {
        let mut login = self.login.lock().unwrap_or_else(PoisonError::into_inner);
        if login.number != number {
            return Ok(());
        }
        let header = header_text(response, &header::WWW_AUTHENTICATE).unwrap_or_default();
        let challenge = Challenge::parse(&header).ok_or_else(|| RegistryError::Challenge {
            url: url.to_owned(),
        })?;
        let credentials = self.auth.find(&self.known_as, &self.repository)?;
        login.has_credentials = credentials.is_some();
        let authorization = match (challenge, credentials) {
            (Challenge::Basic, Some(credentials)) => credentials.basic(),
            (Challenge::Basic, None) => None,
            (Challenge::Bearer(bearer), credentials) => {
                Some(self.token(http, url, &bearer, credentials.as_ref())?)
            }
        };
        login.authorization = Some(authorization.ok_or_else(|| RegistryError::Unauthorized {
            host: self.host.clone(),
            url: url.to_owned(),
            who: "without a login",
            detail: String::new(),
        })?);
        login.number += 1;
        Ok(())
    }

    /// Asks whom the challenge names for a token.
    fn token(
        &self,
        http: &Http,
        url: &str,
        bearer: &auth::Bearer,
        credentials: Option<&Credentials>,
    ) -> Result<String, RegistryError> {
        let realm = http::checked(url, &bearer.realm)?;
        let scope = format!("repository:{}:{}", self.repository, self.actions);
        let mut fields = vec![("scope", scope.as_str())];
        if let Some(service) = &bearer.service {
            fields.push(("service", service));
        }
        let asked = realm.to_string();
        let response = if let Some(Credentials::Identity(token)) = credentials {
            fields.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "iii"),
                ("refresh_token", token),
            ]);
            http.post_form(&realm, &http::form(&fields))
        } else {
            let mark = if realm.query().is_some() { '&' } else { '?' };
            let with_query = format!("{asked}{mark}{}", http::form(&fields));
            let basic = credentials.and_then(Credentials::basic);
            let request = Request::new(Method::GET, with_query);
            http.send(&request, basic.as_deref())
                .map(|sent| sent.response)
        };
        let mut response = response.map_err(|refusal| refusal.0)?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(asked, response, credentials.is_some()).0);
        }
        let mut body = Vec::new();
        let unusable = || RegistryError::Token { url: asked.clone() };
        let reader = Hasty::new(response.body_mut().as_reader());
        reader
            .take(MAX_TOKEN_ANSWER)
            .read_to_end(&mut body)
            .map_err(|_| unusable())?;
        let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|_| unusable())?;
        let token = answer.token.or(answer.access_token).unwrap_or_default();
        let fits = !token.is_empty()
            && token.len() <= MAX_TOKEN
            && token.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| format!("Bearer {token}")).ok_or_else(unusable)
    }

    /// The error that an answer means.
    fn refusal(&self, url: String, mut response: Response<Body>, has_login: bool) -> Refusal {
        let status = response.status();
        let wait = header_text(&response, &header::RETRY_AFTER)
            .and_then(|text| text.trim().parse().ok())
            .map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
        let mut body = Vec::new();
        let reader = Hasty::new(response.body_mut().as_reader());
        let _ = reader.take(MAX_ERROR_BODY).read_to_end(&mut body);
        let detail = error_message(&body);
        let error = match status {
            StatusCode::NOT_FOUND => RegistryError::NotFound { url, detail },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => RegistryError::Unauthorized {
                host: self.host.clone(),
                url,
                who: if has_login {
                    "with the login that is stored for it"
                } else {
                    "without a login"
                },
                detail,
            },
            status => RegistryError::Status {
                url,
                status: status.as_u16(),
                detail,
            },
        };
        (error, wait)
    }

    /// The meaning of a refusal of a write.
    fn not_allowed(&self, (error, wait): Refusal) -> Refusal {
        let error = match error {
            RegistryError::Unauthorized {
                host, who, detail, ..
            } => RegistryError::NotAllowed {
                host,
                repository: self.repository.clone(),
                who,
                detail,
            },
            error => error,
        };
        (error, wait)
    }

    fn has_login(&self) -> bool {
        let login = self.login.lock().unwrap_or_else(PoisonError::into_inner);
        login.has_credentials
    }
}

/// Reads what is small, and has to come within [`DOCUMENT_TIME`].
struct Hasty<R> {
    reader: R,
    begun: Instant,
}

impl<R> Hasty<R> {
    fn new(reader: R) -> Self {
        let begun = Instant::now();
        Self { reader, begun }
    }
}

impl<R: Read> Read for Hasty<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.begun.elapsed() > DOCUMENT_TIME {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.reader.read(buf)
    }
}

#[derive(serde::Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

fn header_text(response: &Response<Body>, name: &header::HeaderName) -> Option<String> {
    let value = response.headers().get(name)?;
    value.to_str().ok().map(str::to_owned)
}

/// The registry's message about an error, made safe to print.
fn error_message(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<Error>,
    }
    #[derive(serde::Deserialize)]
    struct Error {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(Errors { errors }) = serde_json::from_slice(body) else {
        return String::new();
    };
    let Some(Error { code, message }) = errors.into_iter().next() else {
        return String::new();
    };
    let text = if message.is_empty() { code } else { message };
    let text = shown(&text, MAX_ERROR_SHOWN);
    if text.is_empty() {
        text
    } else {
        format!(" (it says: {text})")
    }
}

#[cfg(test)]
mod tests;
