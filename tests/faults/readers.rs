//! Clients that do not read, that vanish without a word, and that close their side and wait.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::http::{self, Pending};
use crate::server::{self, PATIENCE, Server, Witness, long_stream};
use crate::{CHAT, QUESTION};

/// A stream of 15 MB: what sockets hold is full before it ends.
pub(crate) fn large_stream() -> Value {
    let mut body = long_stream();
    body["n"] = json!(8);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(20);
    body
}

/// An answer in one piece that takes many seconds.
fn long_whole() -> Value {
    let mut body = long_stream();
    (body["n"], body["max_tokens"], body["stream"]) = (json!(128), json!(1900), json!(false));
    body
}

/// A connection whose end takes little that nobody reads.
pub(crate) async fn narrow(address: SocketAddr, bytes: u32) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(bytes).expect("a small one");
    socket.connect(address).await.expect("it listens")
}

async fn unread(address: SocketAddr, body: &Value) -> Pending {
    let headers = [("content-type", "application/json")];
    let body = body.to_string();
    http::send_over(narrow(address, 128 << 10).await, "POST", CHAT, &headers, body.as_bytes()).await
}

/// A request as it is on the wire.
fn message(body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

/// What comes up to the end, however that is.
async fn rest(mut socket: TcpStream) -> String {
    let mut got = Vec::new();
    let end = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut got)).await;
    let _ = end.expect("an end"); // or it is cut off
    String::from_utf8_lossy(&got).into_owned()
}

/// Waits until so many sequences were ever asked for, and all that run stand aside but `others`:
/// how many do, and the most memory that was taken meanwhile.
pub(crate) async fn all_stand_aside(server: &Server, asked: f64, others: f64) -> (f64, u64) {
    let (begun, mut most) = (Instant::now(), 0);
    loop {
        most = most.max(server.resident());
        let aside = server.metric("hearth_requests_aside").await;
        let busy = server.metric("hearth_requests_running").await - aside;
        let waiting = server.metric("hearth_requests_waiting").await;
        let came = server.metric("hearth_requests_total").await;
        if came >= asked && aside > 0.0 && busy <= others && waiting <= others {
            return (aside, most);
        }
        assert!(begun.elapsed() < PATIENCE, "{busy} run, {waiting} wait, {aside} stand aside");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Forty streams that nobody reads. Each takes as much memory as may be unread, with what is about
/// to be sent, and no place, no block, no time; and then it is hung up on.
#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_cost_nobody_else() {
    const SLOW: u64 = 40;
    const MIB_EACH: u64 = 2;
    let server = Server::start(&["--max-queue", "512", "--send-timeout-s", "45"]);
    let before = server.greedy(QUESTION).await;
    // Once with a reader: blocks take memory when they are written first.
    server.post(CHAT, &large_stream()).await.chunks();
    let start = server.resident();
    let witness = Witness::before(&server).await;
    let mut slow = Vec::new();
    for _ in 1..SLOW {
        slow.push(unread(server.address, &large_stream()).await);
    }
    slow.push(server.send(CHAT, &large_stream()).await);
    let (aside, most) = all_stand_aside(&server, 8.0 * (SLOW + 1) as f64, 1.0).await;
    let grown = most.saturating_sub(start);
    println!("{aside} stand aside; {} MiB, and {} more", start >> 20, grown >> 20);
    assert!(grown < (SLOW * MIB_EACH) << 20, "{} MiB more", grown >> 20);
    for _ in 0..10 {
        assert_eq!(server.greedy(QUESTION).await, before);
    }
    // Who begins to read after all finds everything.
    let read = slow.pop().expect("one of them").answer().await;
    assert!(read.body.len() > 12 << 20, "{} bytes", read.body.len());
    read.chunks();
    witness.saw_nothing().await;
    // Nobody hangs up, and the server does.
    server.is_idle().await;
    assert!(server.metric("hearth_cancelled_total").await >= 8.0);
    drop(slow);
    server.is_well().await;
}

/// Whoever waits for somebody to read does not turn in circles.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_readers_takes_no_time() {
    let server = Server::start(&[]);
    let mut slow = Vec::new();
    for _ in 0..2 {
        slow.push(unread(server.address, &large_stream()).await);
    }
    all_stand_aside(&server, 16.0, 0.0).await;
    let (before, begun) = (server.cpu_ms(), Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (took, of) = (server.cpu_ms() - before, begun.elapsed().as_millis());
    println!("{took} ms of {of}");
    assert!(u128::from(took) * 4 < of, "{took} ms of {of}");
    drop(slow);
    server.is_idle().await;
    server.is_well().await;
}

/// The sockets of a server once those of earlier requests are closed: one that closes late would be
/// taken for one that was hung up on.
async fn settled(server: &Server) -> usize {
    let (mut sockets, mut since) = (server.sockets(), Instant::now());
    while since.elapsed() < Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = server.sockets();
        if now != sockets {
            (sockets, since) = (now, Instant::now());
        }
    }
    sockets
}

/// A stream, and an answer in one piece that was finished long before.
#[tokio::test(flavor = "multi_thread")]
async fn who_takes_nothing_is_hung_up_on() {
    let server = Server::start(&["--send-timeout-s", "2"]);
    let before = server.greedy(QUESTION).await;
    let mut whole = large_stream();
    whole["stream"] = json!(false);
    for (body, end) in [(large_stream(), "0\r\n\r\n"), (whole, "}}")] {
        let connections = settled(&server).await;
        let mut socket = narrow(server.address, 128 << 10).await;
        socket.write_all(&message(&body)).await.expect("it reads");
        socket.readable().await.expect("an answer");
        server.has_sockets(connections).await;
        let got = rest(socket).await;
        let (head, body) = got.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let len = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
        let len: Option<usize> = len.map(|len| len.parse().expect("a number"));
        let is_whole = len.map_or_else(|| body.ends_with(end), |len| body.len() == len);
        assert!(!is_whole, "all of it came");
        server.is_idle().await;
        assert_eq!(server.greedy(QUESTION).await, before);
    }
    server.is_well().await;
}

/// Who closes its side has left, even if it would have read on: a connection that is closed looks
/// the same until something is written to it, and what nobody may want is not computed till then.
#[tokio::test(flavor = "multi_thread")]
async fn who_closes_its_side_has_left() {
    let server = Server::start(&[]);
    for body in [long_stream(), long_whole()] {
        let cancelled = server.metric("hearth_cancelled_total").await;
        let mut socket = TcpStream::connect(server.address).await.expect("it listens");
        socket.write_all(&message(&body)).await.expect("it reads");
        match body["stream"] == true {
            true => socket.readable().await.expect("an answer"),
            false => server.becomes("hearth_requests_running", 32.0).await,
        }
        socket.shutdown().await.expect("one side of it");
        let got = rest(socket).await;
        assert!(!got.contains("[DONE]") && (body["stream"] == true || got.is_empty()), "{got}");
        server.is_idle().await;
        assert!(server.metric("hearth_cancelled_total").await > cancelled);
    }
    server.is_well().await;
}

/// Two wires to a server in a network of its own: one to talk to it, one to cut.
struct Wires {
    server: Server,
    /// Where it is at the other end of the second wire.
    far: SocketAddr,
    cut: String,
}

fn run(command: &str) -> Result<(), String> {
    let mut words = command.split(' ');
    let mut ip = Command::new(words.next().expect("a word"));
    let output = ip.args(words).output().map_err(|e| format!("{command}: {e}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command}: {said}")) }
}

impl Wires {
    /// Or why that cannot be here.
    fn lay(extra: &[&str]) -> Result<Self, String> {
        run("unshare -n true")?;
        let folder = tempfile::tempdir().expect("a folder");
        let (log, data) = (folder.path().join("log"), folder.path().join("data"));
        let with = [&["--host", "0.0.0.0", "--insecure"][..], extra].concat();
        let mut server = Server::spawn(server::apart(&server::command(&data, &with)), folder, &log);
        let (id, port) = (server.id(), server.address.port());
        let mut ends = ["", ""].map(|_| String::new());
        for (end, net) in ends.iter_mut().zip([231, 232]) {
            let (near, far) = (format!("hn{net}x{}", id % 100_000), format!("hf{net}"));
            run(&format!("ip link add {near} type veth peer name {far} netns {id}"))?;
            run(&format!("ip addr add 10.{net}.7.1/30 dev {near}"))?;
            run(&format!("ip link set {near} up"))?;
            let inside = format!("nsenter -t {id} -n ip");
            run(&format!("{inside} addr add 10.{net}.7.2/30 dev {far}"))?;
            run(&format!("{inside} link set {far} up"))?;
            *end = near;
        }
        let address = |net: u8| SocketAddr::from(([10, net, 7, 2], port));
        server.address = address(231);
        let [_, cut] = ends;
        Ok(Self { server, far: address(232), cut })
    }

    fn set(&self, state: &str) {
        run(&format!("ip link set {} {state}", self.cut)).expect("a wire");
    }
}

/// The wire is cut in the middle of a stream, and while an answer in one piece is computed: no
/// packet says so.
#[tokio::test(flavor = "multi_thread")]
async fn who_vanishes_is_noticed() {
    const TIMEOUT: Duration = Duration::from_secs(4);
    let wires = match Wires::lay(&["--send-timeout-s", "4"]) {
        Ok(wires) => wires,
        Err(why) => {
            let mut out = std::io::stderr();
            writeln!(out, "SKIPPED: nobody may lay a wire to be cut here: {why}").unwrap();
            return;
        }
    };
    let server = &wires.server;
    let before = server.greedy(QUESTION).await;
    for body in [large_stream(), long_whole()] {
        wires.set("up");
        let cancelled = server.metric("hearth_cancelled_total").await;
        let mut socket = TcpStream::connect(wires.far).await.expect("it listens");
        socket.write_all(&message(&body)).await.expect("it reads");
        match body["stream"] == true {
            true => socket.readable().await.expect("an answer"),
            false => server.becomes("hearth_requests_running", 32.0).await,
        }
        wires.set("down");
        let cut = Instant::now();
        // Of many choices some may have ended before.
        server.passes("hearth_cancelled_total", cancelled).await;
        println!("noticed after {:?}", cut.elapsed());
        assert!(cut.elapsed() < TIMEOUT * 4, "{:?}", cut.elapsed());
        server.is_idle().await;
        assert_eq!(server.greedy(QUESTION).await, before);
    }
    server.is_well().await;
}
