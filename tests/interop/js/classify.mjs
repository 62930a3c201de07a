// node classify.mjs FOLDER OPTIONS IMAGE …: what transformers.js answers, as JSON.
import { env, pipeline } from '@huggingface/transformers';

const [folder, options, ...images] = process.argv.slice(2);
Object.assign(env, { allowRemoteModels: false, localModelPath: '/' });
const classify = await pipeline('image-classification', folder, JSON.parse(options));
const answers = [];
for (const image of images) answers.push(await classify(image, { top_k: null }));
console.log(JSON.stringify(answers));
