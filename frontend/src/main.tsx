import "./style/index.css";
import { render } from "preact";
import { applyTheme, storedTheme } from "./style/theme";
import { App } from "./views/app";

applyTheme(storedTheme());
const root = document.getElementById("page");
if (root !== null) render(<App />, root);
