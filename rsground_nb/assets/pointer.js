// A picture to click on or to drag a box over; used by mask_explorer of chapter 12.
function render({ model, el }) {
  const picture = document.createElement("img"), frame = document.createElement("div");
  el.style.cssText = "position: relative; width: fit-content; touch-action: none";
  frame.style.cssText = "position: absolute; border: 2px dashed white; pointer-events: none";
  picture.draggable = false;
  const show = () => { picture.src = "data:image/png;base64," + model.get("picture"); frame.hidden = true; };
  const place = e => {
    const at = picture.getBoundingClientRect();
    const share = (v, side) => Math.min(Math.max(v / side, 0), 1);
    return [share(e.clientX - at.left, at.width), share(e.clientY - at.top, at.height)];
  };
  const box = (a, b) => [0, 1].map(k => Math.min(a[k], b[k])).concat([0, 1].map(k => Math.max(a[k], b[k])));
  let from = null;
  picture.addEventListener("pointerdown", e => { from = place(e); picture.setPointerCapture(e.pointerId); });
  picture.addEventListener("pointermove", e => {
    if (!from) return;
    const [x1, y1, x2, y2] = box(from, place(e)), { width, height } = picture;
    frame.hidden = false;
    Object.assign(frame.style, { left: x1 * width + "px", top: y1 * height + "px",
                                 width: (x2 - x1) * width + "px", height: (y2 - y1) * height + "px" });
  });
  picture.addEventListener("pointerup", e => {
    if (from) { model.set("drawn", box(from, place(e))); model.save_changes(); }
    from = null;
  });
  model.on("change:picture", show);
  show();
  el.append(picture, frame);
}
export default { render };
