import { InvocationError, registerWorker } from 'iii-sdk'

const url = process.env.III_URL ?? 'ws://localhost:49134'
const worker = registerWorker(url)

worker.registerFunction('hello::javascript', async (input) => ({
  message: `Hello, ${input.name ?? 'world'}, from JavaScript!`,
}))

// The SDK reconnects for as long as it takes; the engine's first answer shows
// that the function above has reached it.
for (let answered = false; !answered; ) {
  try {
    await worker.trigger({ function_id: 'engine::functions::list', payload: {} })
    answered = true
  } catch (error) {
    if (!(error instanceof InvocationError && error.code === 'TIMEOUT')) throw error
    console.error(`no engine at ${url} yet`)
  }
}
console.log('ready')
