//! Row H14 of the table of faults: no file descriptors left. The test runs itself again in a child
//! process with a low limit, because it takes all descriptors there are.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::process::Command;
use std::time::Duration;

use spate_server::{App, ServerConfig, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const IN_CHILD: &str = "SPATE_TEST_FD_LIMIT";

#[test]
fn h14_accepting_pauses_without_file_descriptors_and_resumes() {
    if std::env::var_os(IN_CHILD).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(run_out_of_descriptors());
        return;
    }
    let status = Command::new("sh")
        .args(["-c", "ulimit -n 128 && exec \"$0\""])
        .arg(std::env::current_exe().unwrap())
        .env(IN_CHILD, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

async fn run_out_of_descriptors() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(serve(
        listener,
        App::new(ServerConfig::default()),
        std::future::pending(),
    ));
    // Let the server start, and load what it loads on first use.
    let mut client = TcpStream::connect(addr).await.unwrap();
    assert!(answers(&mut client, Duration::from_secs(5)).await);

    // The next client's socket is made first, then every other descriptor is taken: its connection
    // stays in the backlog.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    let mut taken = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
    let mut waiting = socket.connect(addr).await.unwrap();
    assert!(!answers(&mut waiting, Duration::from_millis(300)).await);
    // Connections that are open go on.
    assert!(answers(&mut client, Duration::from_secs(5)).await);

    drop(taken);
    let mut byte = [0];
    let answer = timeout(Duration::from_secs(5), waiting.read(&mut byte)).await;
    assert_eq!(answer.unwrap().unwrap(), 1);
}

/// Asks for `/livez` on a connection that stays open.
async fn answers(stream: &mut TcpStream, patience: Duration) -> bool {
    stream
        .write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut part = [0; 4096];
    match timeout(patience, stream.read(&mut part)).await {
        Ok(read) => part[..read.unwrap()].starts_with(b"HTTP/1.1 200"),
        Err(_) => false,
    }
}
