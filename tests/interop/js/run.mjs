// node run.mjs MODEL.onnx BYTES HEIGHT WIDTH: what ONNX Runtime for Node computes of an RGB image, as JSON.
import { readFileSync } from 'node:fs';
import { InferenceSession, Tensor } from 'onnxruntime-node';

const [model, bytes, height, width] = process.argv.slice(2);
const session = await InferenceSession.create(model);
const image = new Tensor('uint8', new Uint8Array(readFileSync(bytes)), [1, Number(height), Number(width), 3]);
const { probabilities } = await session.run({ image });
console.log(JSON.stringify(Array.from(probabilities.data)));
