'use strict';
// require.js DIR: loads every package of DIR/node_modules that can be loaded, and says how many modules that took.
const fs = require('fs');
const path = require('path');
const { createRequire } = require('module');

const root = path.resolve(process.argv[2]);
const load = createRequire(path.join(root, 'main.js'));
const visible = (dir) => fs.readdirSync(dir).filter((name) => !name.startsWith('.'));
const modules = path.join(root, 'node_modules');
const packages = visible(modules).flatMap((name) =>
  name.startsWith('@') ? visible(path.join(modules, name)).map((inner) => `${name}/${inner}`) : [name],
);

let loaded = 0;
for (const name of packages) {
  try {
    load(name);
    loaded += 1;
  } catch {
    // Types alone, or for a browser.
  }
}
fs.writeSync(1, `${loaded} packages, ${Object.keys(load.cache).length} modules\n`);
// Some packages leave timers and sockets behind.
process.exit(0);
