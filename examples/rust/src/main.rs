//! A worker that says hello.

use iii_sdk::protocol::TriggerRequest;
use iii_sdk::{Error, InitOptions, RegisterFunction, register_worker};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Deserialize, JsonSchema)]
struct Input {
    name: Option<String>,
}

#[derive(Serialize, JsonSchema)]
struct Output {
    message: String,
}

fn hello(input: Input) -> Result<Output, Error> {
    let name = input.name.as_deref().unwrap_or("world");
    Ok(Output {
        message: format!("Hello, {name}, from Rust!"),
    })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::var("III_URL").unwrap_or_else(|_| "ws://localhost:49134".to_owned());
    let worker = register_worker(&url, InitOptions::default());
    worker.register_function("hello::rust", RegisterFunction::new(hello));

    // The SDK reconnects for as long as it takes; the engine's first answer
    // shows that the function above has reached it.
    loop {
        let answer = worker
            .trigger(TriggerRequest {
                function_id: "engine::functions::list".to_owned(),
                payload: serde_json::json!({}),
                action: None,
                timeout_ms: None,
            })
            .await;
        match answer {
            Ok(_) => break,
            Err(Error::Timeout) => eprintln!("no engine at {url} yet"),
            Err(error) => return Err(error.into()),
        }
    }
    println!("ready");

    tokio::signal::ctrl_c().await?;
    worker.shutdown_async().await;
    Ok(())
}
