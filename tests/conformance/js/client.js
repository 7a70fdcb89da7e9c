// What a JavaScript client, made from the published proto, gets from a server.
// node client.js PROTO GRPC_PORT; prints JSON.
"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [, , proto, port] = process.argv;
const definition = loader.loadSync(proto, { keepCase: true, longs: Number, defaults: true, oneofs: true });
const { inference } = grpc.loadPackageDefinition(definition);
const LIMIT_MS = 60000;

const connect = (options) =>
  new inference.GRPCInferenceService(`127.0.0.1:${port}`, grpc.credentials.createInsecure(), options);

const call = (client, method, request, limit = LIMIT_MS) =>
  new Promise((resolve, reject) =>
    client[method](request, { deadline: Date.now() + limit }, (error, reply) =>
      error ? reject(error) : resolve(reply)));

const floats = (bytes) => Array.from({ length: bytes.length / 4 }, (_, i) => bytes.readFloatLE(4 * i));

function request(model, values, more = {}) {
  const bytes = Buffer.alloc(4 * values.length);
  values.forEach((value, i) => bytes.writeFloatLE(value, 4 * i));
  const name = model === "slow" ? "seconds" : "x";
  const inputs = [{ name, datatype: "FP32", shape: [1, values.length] }];
  return { model_name: model, inputs, raw_input_contents: [bytes], ...more };
}

const fault = async (promise) => {
  try {
    await promise;
    return "OK";
  } catch (error) {
    return grpc.status[error.code];
  }
};

function stream(client, count) {
  return new Promise((resolve, reject) => {
    const got = [];
    const duplex = client.ModelStreamInfer({ deadline: Date.now() + LIMIT_MS });
    duplex.on("data", (reply) => got.push(floats(reply.infer_response.raw_output_contents[0])[0]));
    duplex.on("error", reject);
    duplex.on("end", () => resolve(got));
    for (let i = 0; i < count; i++) duplex.write(request("faulty", [i]));
    duplex.end();
  });
}

async function main() {
  const client = connect({ "grpc.max_receive_message_length": -1 });
  const found = {};
  found.live = (await call(client, "ServerLive", {})).live;
  found.ready = (await call(client, "ModelReady", { name: "faulty" })).ready;
  const metadata = await call(client, "ModelMetadata", { name: "add" });
  found.inputs = metadata.inputs.map((each) => [each.name, each.datatype, each.shape]);
  const reply = await call(client, "ModelInfer", request("faulty", [1, 2], { id: "seven" }));
  found.answer = [reply.model_name, reply.id, floats(reply.raw_output_contents[0])];
  const inputs = [{ name: "x", datatype: "FP32", shape: [1, 2], contents: { fp32_contents: [3, 4] } }];
  const typed = await call(client, "ModelInfer", { model_name: "faulty", inputs });
  found.contents = floats(typed.raw_output_contents[0]);
  const many = Array.from({ length: 200 }, (_, i) => call(client, "ModelInfer", request("faulty", [i / 2])));
  found.many = (await Promise.all(many)).map((each) => floats(each.raw_output_contents[0])[0]);
  found.stream = await stream(client, 100);
  const large = Array.from({ length: 1 << 20 }, (_, i) => i % 1000);
  const back = floats((await call(client, "ModelInfer", request("echo-fp32", large))).raw_output_contents[0]);
  found.large = back.length === large.length && back.every((value, i) => value === large[i]);
  const gzip = connect({ "grpc.default_compression_algorithm": 2 });
  found.gzip = floats((await call(gzip, "ModelInfer", request("faulty", Array(500).fill(2)))).raw_output_contents[0])[499];
  found.unknown = await fault(call(client, "ModelInfer", request("nope", [1])));
  found.wrong = await fault(call(client, "ModelInfer", { model_name: "faulty" }));
  found.hot = await fault(call(client, "ModelInfer", request("faulty", [101])));
  found.late = await fault(call(client, "ModelInfer", request("slow", [0.5]), 100));
  found.cancelled = await fault(
    new Promise((resolve, reject) => {
      const pending = client.ModelInfer(request("slow", [0.2]), (error, answer) =>
        error ? reject(error) : resolve(answer));
      setImmediate(() => pending.cancel());
    }));
  const index = await call(client, "RepositoryIndex", {});
  found.models = index.models.filter((each) => each.state === "READY").length;
  client.close();
  gzip.close();
  console.log(JSON.stringify(found));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
